"""VGSGRPOTrainer: reinforcement learning and distillation on the same rollouts, on TRL's GRPO trainer.

The host samples, rewards and normalises. This subclass replaces the loss: the policy gradient, the log-probabilities
and the entropies come from the fused call that also distils, so that the head is projected once. A training step is,
in the order of the methods: sample -> teacher -> plan passes -> loss -> log. ``host_hooks`` says where the host calls
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer

from vgs_kernels import PolicyTerm, VGSObjective

from ..data.answers import answers_match
from ..errors import ConfigError
from ..evaluation.rewards import Reward, named_rewards, needs_answers, that_know_the_prompt
from ..models.groups import PromptGroup, response_lengths
from ..objectives.weighting import token_weights
from ..teachers.sources import TeacherSource, as_sources
from .batching import split_batch
from .checkpoints import check_writable
from .checks import check_processor
from .encoding import encode_ahead
from .grpo_settings import VGSGRPOConfig
from .host_hooks import HostHooks
from .instruments import add_instruments
from .micro_batch import MicroBatch, mean_left_out, mean_overlap, mean_terms
from .off_policy import check_caches
from .passes import Outputs, loss_in_passes, means_to_log, note
from .policy_scoring import LonePolicyScorer, PolicyScorer, clip_ratios, policy_weights
from .preparation import prepare_models
from .rollouts import rollout, samples_of
from .routes import itself, make_teachers, open_teachers, place_teachers, routes_of
from .term_bins import terms_by_bin


class VGSGRPOTrainer(HostHooks, GRPOTrainer):
    """Clipped GRPO with Visual Gradient Steering (or another distillation) as an auxiliary loss on the same rollouts.

    Args:
        model: the student, a vision-language model or its id.
        teacher_model: the teacher or several of them, as of ``VGSTrainer``. Not used with ``alpha=0``.
        args: a ``VGSGRPOConfig``.
        reward_funcs: as in TRL; None takes those that ``args.rewards`` names.
        train_dataset, eval_dataset: samples with ``prompt`` (chat messages), ``images`` (list of PIL images) and the
            columns that the rewards read (``answer``): a dataset, or any sequence of such dicts.
        processing_class: the student's processor; None loads it.
        scorer: ``scorer(response_text, gold_answer) -> bool``, for the accuracy and the reward ``exact_match``; None
            compares the final answers (``vgs.data.answers.answers_match``).
        reward_processing_classes, callbacks, optimizers, quantization_config, peft_config: as in TRL.
        tools, rollout_func, environment_factory: not supported.

    Attributes:
        placeholder_ids: image and video tokens, which are never sampled.
        step_scorer: runs student and teacher.
        steering, resume: see ``HostHooks``.

    Raises:
        TypeError: ``args`` is not a ``VGSGRPOConfig``, or ``processing_class`` is not a processor with images.
        ConfigError: an unsupported argument, no teacher, one that does not fit, no gold answers for a reward, or
            versions of TRL and transformers that do not fit.
    """

    _tag_names = ("trl", "grpo", "vgs")
    _name = "VGS-GRPO"
    _paper = MappingProxyType(
        {"title": "Decomposed On-Policy Distillation for Vision-Language Reasoning", "id": "2606.00564"}
    )

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module | TeacherSource | Mapping[str, str | nn.Module | TeacherSource] | None = None,
        args: VGSGRPOConfig | None = None,
        reward_funcs: Reward | Sequence[Reward] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        scorer: Callable[[str, str], bool] | None = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
    ) -> None:
        if not isinstance(args, VGSGRPOConfig):
            raise TypeError(f"args must be a VGSGRPOConfig, got {type(args).__name__}.")
        check_writable(args.output_dir)
        for name, value in (
            ("tools", tools),
            ("rollout_func", rollout_func),
            ("environment_factory", environment_factory),
        ):
            if value:
                raise ConfigError(f"{name} is not supported: responses must be one turn to a prompt. Leave it out.")
        if teacher_model is None and args.alpha > 0:
            raise ConfigError(
                f"teacher_model is needed for alpha={args.alpha}; only alpha=0 (GRPO alone) goes without."
            )
        check_processor(processing_class)
        check_caches(as_sources(teacher_model if args.alpha > 0 else None), fraction=1)
        self.scorer = scorer or answers_match
        super().__init__(
            model=model,
            reward_funcs=_reward_funcs(reward_funcs, args, train_dataset, scorer),
            args=args,
            train_dataset=as_dataset(train_dataset),
            eval_dataset=as_dataset(eval_dataset),
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self.aux_loss_enabled:
            raise ConfigError(
                f"router_aux_loss_coef must be 0 for {type(self.model).__name__}, got {self.router_aux_loss_coef} (its "
                "config's, unless set): the fused loss has no load-balancing term."
            )
        self.reward_funcs = that_know_the_prompt(
            self.reward_funcs, self.processing_class, **(args.chat_template_kwargs or {})
        )
        # In GRPO alone the student is compared with itself and asked nothing.
        place_teachers(self, open_teachers(teacher_model, args) if args.alpha > 0 else itself(self.model))
        if self.use_vllm:  # without it the host has them
            self.generation_kwargs, self.generation_config = {}, GenerationConfig()
        prepare_models(self, ("separate",))
        kind = LonePolicyScorer if args.alpha == 0 else PolicyScorer
        teachers = {} if args.alpha == 0 else make_teachers(self)
        self.step_scorer = kind(self.args, self.accelerator, teachers, self.anchor, self.packs)
        add_instruments(self)
        encode_ahead(self)

    @property
    def objective(self) -> VGSObjective:
        """The distillation's, with gamma warmed up and guarded in training; alpha is on the token weights."""
        gamma = self.steering.gamma(self.args, self.state.global_step) if self.model.training else None
        return self.args.objective(1.0, gamma)

    @property
    def responses_per_prompt(self) -> int:
        """How many responses to each prompt are sampled, in training or evaluation."""
        return self.num_generations if self.model.training else self.num_generations_eval

    # ---- a training step

    def next_micro_batch(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``compute_loss`` takes next: ``groups``, ``teacher``, ``sampled``, ``advantages`` and ``num_items``.

        As the host's, but not shuffled: responses to one prompt stay together.

        Args:
            generation_batch: samples, one per response: of ``steps_per_generation`` micro-batches in training, of a
                batch in evaluation.
        """
        if not self.model.training:
            return self.with_teacher(self.sample(generation_batch))
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            with self.clock.phase("sampling"):
                batch = self.sample(generation_batch)
            with self.clock.phase("teacher"):
                batch = self.with_teacher(batch)
            self._buffered_inputs = split_batch(batch, steps, ("teacher", "sampled", "advantages"))
        return self._buffered_inputs[self._step % steps]

    def sample(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The student's responses: ``groups`` (prompts with theirs), ``routes`` (the names of their teachers), their
        ``advantages``, what else the host has ``sampled`` of their tokens, and ``num_items``, what the loss is a mean
        of.

        Args:
            inputs: samples, one per response; in training those to one prompt follow each other.
        """
        output, groups = rollout(self, inputs, self.responses_per_prompt)
        lengths = response_lengths(groups)
        counts = torch.tensor([[sum(lengths), sum(length > 0 for length in lengths)]], device=self.accelerator.device)
        tokens, trajectories = self.accelerator.gather(counts).sum(dim=0)
        per_token = [name for name in ("old_per_token_logps", "importance_sampling_ratio") if name in output]
        sampled = [
            {name: _tokens(output[name][row], length) for name in per_token} for row, length in enumerate(lengths)
        ]
        return {
            "groups": groups,
            "routes": routes_of(samples_of(inputs, groups), self.args.teacher_column, list(self.opened)),
            "sampled": sampled,
            "advantages": output["advantages"],
            "num_items": {"token": tokens, "trajectory": trajectories},
        }

    def with_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A sampled batch with ``teacher``, what the teacher says of each response. It may serve several steps, and so
        serves gamma as it is set, whatever is in force."""
        objective = self.args.objective(1.0)
        text = self.step_scorer.needs_text(objective)
        groups, routes = batch["groups"], batch.pop("routes", None)
        return {**batch, "teacher": self.step_scorer.score_teacher(groups, objective, text, routes=routes)}

    def plan_passes(self, inputs: dict[str, Any]) -> MicroBatch:
        """A micro-batch with its tokens' weights in both losses, and which responses run together.

        Args:
            inputs: from ``next_micro_batch``.
        """
        alpha, lengths = self.args.alpha, response_lengths(inputs["groups"])
        # A sampled batch may last several optimizer steps; evaluation takes it at once.
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        share = accumulated / self.args.steps_per_generation if self.model.training else 1.0
        # Per process: gradients are averaged over processes.
        items = {
            name: count.clamp(min=1) * (share / self.accelerator.num_processes)
            for name, count in inputs["num_items"].items()
        }
        reduction = self.args.loss_reduction
        weights = token_weights(lengths, reduction, items[reduction], self.accelerator.device)
        policy = None if alpha == 1 else self._policy(inputs, lengths, items["token"], accumulated)
        return self.step_scorer.micro_batch(
            inputs["groups"],
            inputs["teacher"],
            [alpha * weight for weight in weights],
            self.objective,
            self.args.log_terms,
            policy=policy,
        )

    def _policy(self, inputs: dict[str, Any], lengths: list[int], tokens: Tensor, accumulated: int) -> list[PolicyTerm]:
        """The policy gradient of every response, as ``plan_passes`` wants it."""
        factor = 1 - self.args.alpha
        if self.loss_type != "dapo":  # there the divisor spans the optimizer step already
            factor /= accumulated
        weights = policy_weights(self.loss_type, lengths, self.max_completion_length, tokens)
        return [
            PolicyTerm(
                advantage.expand(length),
                (factor * weight).expand(length) * entry.get("importance_sampling_ratio", 1.0),
                entry.get("old_per_token_logps"),
                self.epsilon_low,
                self.epsilon_high,
            )
            for advantage, weight, length, entry in zip(
                inputs["advantages"], weights, lengths, inputs["sampled"], strict=True
            )
        ]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch. All its passes but the last have gone backward already when it returns."""
        batch = self.plan_passes(inputs)
        loss, outputs = loss_in_passes(self.step_scorer, model, batch, self.model.training)
        self.log_terms(batch, outputs)
        return (loss, None) if return_outputs else loss

    def log_terms(self, batch: MicroBatch, outputs: Outputs) -> None:
        """Adds a micro-batch to the metrics and, in training, to what is watched for collapse."""
        if self.args.alpha == 0:
            means = mean_terms(self.accelerator, outputs, terms=False)
        else:
            means = means_to_log(self.accelerator, outputs, batch.objective, self.args)
            means |= mean_overlap(self.accelerator, batch, self.args.log_overlap)
            means |= terms_by_bin(self.accelerator, outputs, self.args.log_terms_by_bin)
        if self.model.training and self.args.gradient_tolerance > 0:
            means |= mean_left_out(self.accelerator, outputs)
        if batch.policy is not None:
            means |= clip_ratios(self.accelerator, batch, outputs)
        note(self, means)

    # ---- what the host asks

    def sampled_logps(self, model: nn.Module, groups: list[PromptGroup], length: int) -> Tensor:
        """[B, C] log-probabilities of sampled tokens under the policy as it is, 0 where there is no token.

        Args:
            model: the student as prepared by accelerate.
            groups: prompts with their responses, B in all.
            length: C.
        """
        found = self.step_scorer.student_logps(model, groups)
        logps = torch.zeros(len(found), length, device=self.accelerator.device)
        for row, values in zip(logps, found, strict=True):
            row[: len(values)] = values
        return logps


def _reward_funcs(
    given: Any, args: VGSGRPOConfig, samples: Any, scorer: Callable[[str, str], bool] | None
) -> list[Reward]:
    if given is not None:
        if args.rewards is not None:
            raise ConfigError(f"reward_funcs and args.rewards={args.rewards} are both given; expected one of them.")
        return list(given) if isinstance(given, (list, tuple)) else [given]
    names = args.rewards or ["exact_match"]
    first = samples[0] if hasattr(samples, "__getitem__") and len(samples) else {"answer": ""}
    if needs_answers(names) and not {"answer", "solution"} & set(first):
        raise ConfigError(
            f"rewards={names} need gold answers, but train_dataset has no column 'answer' or 'solution', only "
            f"{', '.join(sorted(first))}."
        )
    return named_rewards(names, scorer)


def as_dataset(samples: Any) -> Any:
    """A sequence of samples as the dataset that the host insists on; read on access."""
    if isinstance(samples, dict):
        return {name: as_dataset(part) for name, part in samples.items()}
    if isinstance(samples, (datasets.Dataset, datasets.IterableDataset)) or not hasattr(samples, "__len__"):
        return samples

    def rows(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        chosen = [samples[index] for index in batch["index"]]
        return {name: [sample[name] for sample in chosen] for name in chosen[0]}

    return datasets.Dataset.from_dict({"index": range(len(samples))}).with_transform(rows)


def _tokens(values: Tensor, length: int) -> Tensor:
    """[T] of a padded row [C], or of a row's one value."""
    return values[:length] if len(values) > 1 else values.expand(length)
