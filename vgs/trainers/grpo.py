"""VGSGRPOTrainer: reinforcement learning and distillation on the same rollouts, on TRL's GRPO trainer.

The host samples, rewards and normalises. This subclass replaces the loss: the policy gradient, the log-probabilities
and the entropies come from the fused call that also distils, so that the head is projected once. Its hooks are private
names of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer
from trl.models import prepare_deepspeed
from trl.trainer.utils import create_model_from_path

from vgs_kernels import DivergenceOutput, PolicyTerm, VGSObjective, VGSOutput

from ..data.answers import answers_match
from ..errors import ConfigError
from ..evaluation.rewards import Reward, named_rewards, needs_answers
from ..models.families import is_verified
from ..models.groups import response_lengths
from ..objectives.eta import SteeringState
from .base import VGSHost
from .batching import select_responses
from .checkpoints import ExactResume, check_writable
from .grpo_settings import VGSGRPOConfig
from .micro_batch import MicroBatch, mean_terms
from .policy_scoring import LonePolicyScorer, PolicyScorer, clip_ratios, policy_weights
from .rollouts import SampledAnswers, expand_images_once, image_groups, sampled_groups


class VGSGRPOTrainer(VGSHost, SampledAnswers, ExactResume, GRPOTrainer):
    """Clipped GRPO with Visual Gradient Steering (or another distillation) as an auxiliary loss on the same rollouts.

    Args:
        model: the student, a vision-language model or its id.
        teacher_model: the teacher, with the student's vocabulary and image tokens, or its id. Not used with
            ``alpha=0``.
        args: a ``VGSGRPOConfig``.
        reward_funcs: as in TRL; None takes those that ``args.rewards`` names.
        train_dataset, eval_dataset: samples with ``prompt`` (chat messages), ``images`` (list of PIL images) and the
            columns that the rewards read (``answer``): a dataset, or any sequence of such dicts.
        processing_class: the student's processor; None loads it.
        scorer: ``scorer(response_text, gold_answer) -> bool``, for the accuracy and the reward ``exact_match``; None
            compares the final answers (``vgs.data.answers.answers_match``).
        reward_processing_classes, callbacks, optimizers, quantization_config, peft_config: as in TRL.
        tools, rollout_func, environment_factory: not supported.

    Raises:
        TypeError: ``args`` is not a ``VGSGRPOConfig``, or ``processing_class`` is not a processor with images.
        ValueError: an unsupported argument, no teacher, one that does not fit, or no gold answers for a reward.
    """

    _tag_names = ("trl", "grpo", "vgs")
    _name = "VGS-GRPO"
    _paper = MappingProxyType(
        {"title": "Decomposed On-Policy Distillation for Vision-Language Reasoning", "id": "2606.00564"}
    )

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module | None = None,
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
                raise ValueError(f"{name} is not supported: responses must be one turn to a prompt. Leave it out.")
        if teacher_model is None and args.alpha > 0:
            raise ValueError(f"teacher_model is needed for alpha={args.alpha}; only alpha=0 (GRPO alone) goes without.")
        if processing_class is not None and not isinstance(processing_class, ProcessorMixin):
            raise TypeError(
                "processing_class must be a processor with an image processor (transformers.ProcessorMixin), got "
                f"{type(processing_class).__name__}."
            )
        self.scorer = scorer or answers_match
        self.steering = SteeringState()
        self._watched: list[list[float]] = []  # means of this optimizer step's micro-batches
        super().__init__(
            model=model,
            reward_funcs=_reward_funcs(reward_funcs, args, train_dataset, scorer),
            args=args,
            train_dataset=as_dataset(train_dataset),
            eval_dataset=as_dataset(eval_dataset),
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=[*(callbacks or []), self.steering],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if self.aux_loss_enabled:
            raise ValueError(
                f"router_aux_loss_coef must be 0 for {type(self.model).__name__}, got {self.router_aux_loss_coef} (its "
                "config's, unless set): the fused loss has no load-balancing term."
            )
        if args.alpha == 0:
            self.teacher_model = self.model  # compared with itself and asked nothing
        else:
            self.teacher_model = self._prepare_teacher(teacher_model)
        if self.use_vllm:  # without it the host has them
            self.generation_kwargs, self.generation_config = {}, GenerationConfig()
        self._prepare_scoring()
        if self.use_vllm and self.vllm_mode == "colocate":
            expand_images_once(self.vllm_generation, self.model.config.image_token_id)

    def _prepare_teacher(self, teacher: str | nn.Module) -> nn.Module:
        """As TRL's distillation trainer does."""
        options = dict(self.args.teacher_model_init_kwargs or {})
        if isinstance(teacher, str):
            options.setdefault("dtype", None)
            if self.accelerator.num_processes > 1:
                options["device_map"] = None
            options.setdefault("trust_remote_code", self.args.trust_remote_code)
            teacher = create_model_from_path(teacher, **options)
        elif options:
            raise ValueError("teacher_model_init_kwargs must be left out for a teacher_model that is loaded already.")
        sizes = [x.config.get_text_config().vocab_size for x in (self.model, teacher)]
        if sizes[0] != sizes[1]:
            raise ValueError(f"teacher_model has a vocabulary of {sizes[1]}, the student of {sizes[0]}; expected one.")
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _make_scorer(self) -> PolicyScorer:
        kind = LonePolicyScorer if self.args.alpha == 0 else PolicyScorer
        packs = all(is_verified(self.accelerator.unwrap_model(x)) for x in (self.model, self.teacher_model))
        return kind(self.args, self.accelerator, self.teacher_model, self._anchor(), packs)

    @property
    def objective(self) -> VGSObjective:
        """The distillation's; alpha is on the token weights."""
        return self.args.objective(1.0)

    # ---- rollouts

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **fields: Any,
    ) -> tuple[Tensor, None, None]:
        """What the host asks of the policy that sampled: [B, C] log-probabilities, 0 where there is no token."""
        prompt = input_ids.shape[1] - logits_to_keep
        batch = {**fields, "prompt_ids": input_ids[:, :prompt], "completion_ids": input_ids[:, prompt:]}
        batch |= {"prompt_mask": attention_mask[:, :prompt], "completion_mask": attention_mask[:, prompt:]}
        found = self.step_scorer.student_logps(model, image_groups(batch, self._responses_per_prompt))
        logps = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
        for row, values in zip(logps, found, strict=True):
            row[: len(values)] = values
        return logps, None, None

    @property
    def _responses_per_prompt(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A sampled batch: prompts with their responses, and what the loss needs of each response."""
        output = super()._generate_and_score_completions(inputs)
        self._score_answers(inputs, output)
        prompts, options = [x["prompt"] for x in inputs], self.chat_template_kwargs
        groups = sampled_groups(
            output, prompts, self._responses_per_prompt, self.processing_class, self.placeholder_ids, **options
        )
        lengths = response_lengths(groups)
        counts = torch.tensor([[sum(lengths), sum(length > 0 for length in lengths)]], device=self.accelerator.device)
        tokens, trajectories = self.accelerator.gather(counts).sum(dim=0)
        per_token = [name for name in ("old_per_token_logps", "importance_sampling_ratio") if name in output]
        sampled = [
            {name: _tokens(output[name][row], length) for name in per_token} for row, length in enumerate(lengths)
        ]
        return {
            "groups": groups,
            "sampled": sampled,
            "advantages": output["advantages"],
            "num_items": {"token": tokens, "trajectory": trajectories},
        }

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch. As the host's, but not shuffled: responses to one prompt stay together."""
        if not self.model.training:
            return self._with_teacher(self._generate_and_score_completions(generation_batch))
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._with_teacher(self._generate_and_score_completions(generation_batch))
            size = len(batch["teacher"]) // steps
            self._buffered_inputs = [
                {
                    "groups": select_responses(batch["groups"], range(first, first + size)),
                    "num_items": batch["num_items"],
                    **{name: batch[name][first : first + size] for name in ("teacher", "sampled", "advantages")},
                }
                for first in range(0, size * steps, size)
            ]
        return self._buffered_inputs[self._step % steps]

    # ---- loss

    def _micro_batch(self, inputs: dict[str, Any]) -> MicroBatch:
        alpha, lengths = self.args.alpha, response_lengths(inputs["groups"])
        # A sampled batch may last several optimizer steps; evaluation takes it at once.
        accumulated = self.current_gradient_accumulation_steps if self.model.training else 1
        share = accumulated / self.args.steps_per_generation if self.model.training else 1.0
        # Per process: gradients are averaged over processes.
        items = {
            name: count.clamp(min=1) * (share / self.accelerator.num_processes)
            for name, count in inputs["num_items"].items()
        }
        weights = self._token_weights(lengths, items[self.args.loss_reduction])
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

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of a micro-batch. All its passes but the last have gone backward already when it returns."""
        batch = self._micro_batch(inputs)
        loss, outputs = self._loss_in_passes(model, batch)
        self._log(outputs, self.model.training)
        if batch.policy is not None:
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, value in clip_ratios(self.accelerator, batch, outputs).items():
                metrics[name].append(value)
        return loss

    def _means(self, outputs: Sequence[VGSOutput | DivergenceOutput]) -> dict[str, float]:
        if self.args.alpha == 0:
            return mean_terms(self.accelerator, outputs, terms=False)
        return super()._means(outputs)


def _reward_funcs(
    given: Any, args: VGSGRPOConfig, samples: Any, scorer: Callable[[str, str], bool] | None
) -> list[Reward]:
    if given is not None:
        if args.rewards is not None:
            raise ValueError(f"reward_funcs and args.rewards={args.rewards} are both given; expected one of them.")
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
