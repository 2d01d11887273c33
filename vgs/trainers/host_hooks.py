"""Every private method of TRL and transformers that the trainers replace, and the check that the hosts still have them.

TRL's trainers have no public place for another loss on their own rollouts, and the training loop of transformers has
none for checkpoints that appear whole. So a few private methods are overridden: all of them here, each by a line or two
that call a method or an object with a plain name. ``check_signatures`` runs before any model is loaded and stops where
a method is not as recorded.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import transformers
import trl
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl.models import prepare_deepspeed
from trl.trainer.utils import RepeatSampler, create_model_from_path

from ..data.prompts import unexpanded_ids
from ..errors import ConfigError
from ..evaluation.sampling import own_generation_config
from .clock import StepClock
from .collapse_watch import SteeringState
from .model_card import write_card
from .resume import ExactResume
from .rollouts import Questions, as_host_prompts, greedy_decoding, several_answers
from .step import UNSHARDED
from .weights import load_renamed_weights

__all__ = ["HostHooks", "check_signatures", "create_model_from_path", "prepare_deepspeed", "repeat_prompts"]

#: The versions that ``SIGNATURES`` was recorded with.
KNOWN_VERSIONS = "trl 1.14.2 to 1.16.0 and transformers 5.17 to 5.24"

# Methods of transformers.Trainer: its loop and its checkpoints.
_LOOP = {
    "_get_output_dir": ("self, trial",),
    "_push_from_checkpoint": ("self, checkpoint_folder",),
    "_save_checkpoint": ("self, model, trial",),
    "_save_rng_state": ("self, output_dir",),
    "_load_rng_state": ("self, checkpoint",),
    "_load_from_checkpoint": ("self, resume_from_checkpoint, model",),
    "_load_best_model": ("self",),
    "_load_callback_state": ("self",),
    "_init_training_state": (
        "self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial",
    ),
    "_prepare_for_training": ("self, max_steps, train_dataloader, resume_from_checkpoint",),
    "_evaluate": ("self, trial, ignore_keys_for_eval, skip_scheduler",),
    "_run_epoch": (
        "self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch",
    ),
    "_maybe_log_save_evaluate": (
        "self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate",
    ),
    "_finalize_training": ("self, trial, num_train_samples, start_time",),
    "train": ("self, resume_from_checkpoint, trial, ignore_keys_for_eval",),
}
# Methods of TRL's on-policy trainers: the rollout and the loss.
_ROLLOUT = {
    "_set_signature_columns_if_needed": ("self",),
    "_get_train_sampler": ("self, dataset",),
    "_tokenize_prompts": ("self, prompts",),
    "_generate_and_score_completions": ("self, inputs",),
    "_prepare_inputs": ("self, generation_batch",),
    "compute_loss": ("self, model, inputs, return_outputs, num_items_in_batch",),
    "training_step": ("self, model, inputs, num_items_in_batch",),
}
#: Host -> method -> its parameters, in each form that a supported version has; "..." stands for any that follow.
SIGNATURES: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "DistillationTrainer": {
            **_LOOP,
            **_ROLLOUT,
            "_generate_single_turn": ("self, prompt_ids, images, multimodal_fields, has_tool_images",),
        },
        "GRPOTrainer": {
            **_LOOP,
            **_ROLLOUT,
            "_generate_single_turn": ("self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images",),
            "_calculate_rewards": ("self, inputs, prompts, completions, completion_ids_list",),
            "_get_per_token_logps_and_entropies": (
                "self, model, input_ids, attention_mask, logits_to_keep, ...",  # then the image fields of all families
                "self, model, *args, batch_size, compute_aux_loss, **kwargs",  # trl 1.14
            ),
        },
    }
)
#: Private attributes of both hosts that are read or written before the training begins.
ATTRIBUTES = ("_buffered_inputs", "_metrics", "_step")


def check_signatures(host: type) -> None:
    """Stop where a host's private methods are not as recorded.

    Args:
        host: ``trl.DistillationTrainer``, ``trl.GRPOTrainer`` or a subclass.

    Raises:
        ConfigError: a method that is missing or takes other parameters.
    """
    kind = next(base.__name__ for base in host.__mro__ if base.__name__ in SIGNATURES)
    for name, forms in SIGNATURES[kind].items():
        method = getattr(host, name, None)
        found = None if method is None else parameters_of(method)
        if found is None or not any(_fits(found, form) for form in forms):
            raise ConfigError(
                f"{kind}.{name} is expected to take ({') or ('.join(forms)}), but in trl {trl.__version__} with "
                f"transformers {transformers.__version__} it {'is missing' if found is None else f'takes ({found})'}; "
                f"install versions that are known to fit: {KNOWN_VERSIONS}."
            )


def parameters_of(method: Any) -> str:
    """The names of a method's parameters, in one line: ``"self, prompts, *args"``."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(inspect.unwrap(method)).parameters.values()
    return ", ".join(stars.get(parameter.kind, "") + parameter.name for parameter in parameters)


def _fits(found: str, form: str) -> bool:
    return found.startswith(form.removesuffix("...")) if form.endswith("...") else found == form


def check_attributes(trainer: Any) -> None:
    """Stop where a trainer that its host has initialised lacks a private attribute.

    Raises:
        ConfigError: such an attribute.
    """
    if missing := [name for name in ATTRIBUTES if not hasattr(trainer, name)]:
        raise ConfigError(
            f"{type(trainer).__name__} is expected to have {missing[0]} from trl, but trl {trl.__version__} with "
            f"transformers {transformers.__version__} sets none; install versions that are known to fit: "
            f"{KNOWN_VERSIONS}."
        )


def repeat_prompts(sampler: RepeatSampler, count: int) -> RepeatSampler:
    """A sampler of TRL's distillation trainer with every prompt ``count`` times in a row."""
    return RepeatSampler(
        sampler.data_source,
        mini_repeat_count=count,
        batch_size=sampler.batch_size // count,
        repeat_count=sampler.repeat_count,
        shuffle=sampler.shuffle,
        seed=sampler.seed,
    )


class HostHooks:
    """The base of the trainers, in front of a trainer of TRL.

    A subclass has ``next_micro_batch`` and ``compute_loss``; it may replace ``train_sampler``, ``sampled_logps`` and
    ``extra_columns``.

    Args:
        callbacks: as in TRL; ``steering`` is added.
        **arguments: of the host.

    Attributes:
        steering: the measured eta, and the watch for collapse.
        resume: writes checkpoints that are whole or absent, and continues from them.
        clock: the seconds of a step's phases.
        extra_columns: columns of the data that are kept beside the host's.

    Raises:
        ConfigError: the installed host is not as this file expects.
    """

    extra_columns: tuple[str, ...] = ()
    _questions: Questions | None = None  # while the host samples
    _evaluated: str = "eval"  # the prefix of the set at hand

    def __init__(self, *, callbacks: Sequence[TrainerCallback] | None = None, **arguments: Any) -> None:
        classes = type(self).__mro__
        check_signatures(classes[classes.index(HostHooks) + 1])
        self.steering, self.resume = SteeringState(), ExactResume(self)
        self.clock = StepClock(lambda name, value: self.open_metrics[name].append(value))
        super().__init__(callbacks=[*(callbacks or []), self.steering, self.clock], **arguments)
        check_attributes(self)

    @property
    def student(self) -> nn.Module:
        """The model without what accelerate has put around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def open_metrics(self) -> dict[str, list[float]]:
        """name -> values since the last log, of training or of evaluation; the host logs their means."""
        return self._metrics["train" if self.model.training else "eval"]

    # ---- the log

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The host's; with several sets each has metrics of its own, such as ``eval_NAME_accuracy``.

        No sample is left out: prompts longer than ``max_prompt_length`` are answered too.

        Args:
            *args, **kwargs: as of the host.
            metric_key_prefix: in front of every metric's name.
        """
        self._evaluated, self.step_scorer.strict = metric_key_prefix, False
        try:
            return super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._evaluated, self.step_scorer.strict = "eval", True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The host's, which names all metrics of evaluation ``eval_...``, whichever set they belong to."""
        if not self.model.training and self._evaluated != "eval":
            values = {name: [x for x in found if not math.isnan(x)] for name, found in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            logs |= {f"{self._evaluated}_{name}": sum(x) / len(x) if x else None for name, x in values.items()}
        super().log(logs, start_time)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: Any = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """The host's public hook, which it calls with every checkpoint: ``model_card.write_card``."""
        if self.is_world_process_zero():
            write_card(self, model_name, dataset_name, [tags] if isinstance(tags, str) else tags or ())

    # ---- the rollout

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        named = [self.args.teacher_column] if self.args.teacher_column is not None else []
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *self.extra_columns, *named]))

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return self.train_sampler(super()._get_train_sampler(dataset))

    def train_sampler(self, sampler: Sampler) -> Sampler:
        """What training takes in place of the host's sampler."""
        return sampler

    def _tokenize_prompts(self, prompts: list) -> tuple:
        return self._questions.host_prompts

    def _generate_single_turn(self, prompt_ids: list, images: Any, fields: Any, *args: Any, **kwargs: Any) -> Any:
        greedy = self.args.eval_greedy and not self.model.training
        several = nullcontext()
        if self.use_vllm:
            images = self._questions.images
        elif not (greedy or self._questions.count == 1 or getattr(self, "use_transformers_continuous_batching", False)):
            prompt_ids, _, fields = as_host_prompts(self._questions.groups)
            several = several_answers(self, self._questions.count)
        with own_generation_config(self.student), greedy_decoding(self) if greedy else several:
            return super()._generate_single_turn(prompt_ids, images, fields, *args, **kwargs)

    def unexpanded_prompts(self) -> list[list[int]]:
        """Token ids of the prompts that are being asked, one per response, with one mark per image."""
        options = {"chat_template": self.chat_template, **self.chat_template_kwargs}
        return [unexpanded_ids(self.processing_class, x, **options) for x in self._questions.host_messages]

    def _calculate_rewards(self, inputs: list, prompts: list, *args: Any) -> Tensor:  # of the GRPO trainer alone
        return super()._calculate_rewards(self._questions.samples, self._questions.host_messages, *args)

    def host_rollout(self, questions: Questions) -> dict[str, Any]:
        """The host's sampled batch: padded prompts and responses, and all else that it makes of them.

        Args:
            questions: the prompts as we encode them; the host's own ways to do so are bypassed.
        """
        self._questions = questions
        try:
            return self._generate_and_score_completions(questions.host_samples)
        finally:
            self._questions = None

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        return self.next_micro_batch(generation_batch)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:  # of the GRPO trainer alone
        ids, mask = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:]
        return self.sampled_logps(model, self._questions.answered(ids, mask), logits_to_keep), None, None

    # ---- checkpoints

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The host's; ``True`` resumes from the newest complete checkpoint, or starts anew where there is none.

        Raises:
            ConfigError: the given checkpoint does not exist or is damaged.
        """
        return super().train(self.resume.choose(resume_from_checkpoint), *args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self.resume.output_dir(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.resume.staging:  # uploads go on in the background, so only from a folder that keeps its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.resume.saving(Path(self._get_output_dir(trial))) as final:
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.resume.save(output_dir)

    # ---- resuming

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, checkpoint, trial)
        return self.resume.begin(checkpoint, position, max_steps, steps_per_epoch, num_train_epochs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_renamed_weights(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.load_renamed_weights(self.state.best_model_checkpoint)

    def load_renamed_weights(self, checkpoint: str) -> None:
        """Load what the host has left out of a checkpoint, whose names are those of published files."""
        if self.accelerator.distributed_type in UNSHARDED:
            load_renamed_weights(self.student, checkpoint)

    def _load_callback_state(self) -> None:
        super()._load_callback_state()  # may put other instances in the callbacks' place
        kind = type(self.steering)
        self.steering = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        self.resume.skip_epochs(train_dataloader)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Before anything is restored this can only be ``eval_on_start``, which was done when the run began.
        return {} if self.resume.pending is not None else super()._evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self.resume.restore()
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, learning_rate: float | None = None
    ) -> None:
        with self.resume.step_closed(grad_norm, learning_rate) as (grad_norm, learning_rate):
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self.resume.restore()
        return super()._finalize_training(trial, num_train_samples, min(start_time, self.resume.began))

    # ---- what the loop keeps in memory alone

    def unsaved_state(self) -> dict[str, Any]:
        """What a checkpoint of the host lacks: losses and metrics not logged yet, and the place in the generation
        cycle."""
        return {
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "passes": self._step,
            "metrics": {mode: dict(values) for mode, values in self._metrics.items()},
            "training": self.model.training,
        }

    def restore_unsaved_state(self, state: Mapping[str, Any]) -> None:
        """Take over what ``unsaved_state`` gave, in a loop that has been resumed."""
        self._initial_global_step = 0  # like its beginning: final means and rates are those of the whole run
        self._tr_loss = state["loss"].to(self.args.device)
        self._total_loss_scalar = state["total_loss"]
        self._globalstep_last_logged = state["last_logged"]
        self._step = state["passes"]
        self.model.train(state["training"])  # by this the host decides whose metrics it logs
        for mode, values in state["metrics"].items():
            self._metrics[mode].clear()
            self._metrics[mode].update(values)

    def restore_rng_state(self, checkpoint: str) -> None:
        """Random numbers go on as they did after the checkpoint."""
        self._load_rng_state(checkpoint)
