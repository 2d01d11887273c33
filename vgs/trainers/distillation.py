"""VGSTrainer: Visual Gradient Steering on TRL's on-policy distillation trainer.

The host samples responses, batches, accumulates, logs, saves and resumes. This subclass adds the text-only view to the
sampled batch, replaces the loss, and measures. Its hooks are private names of TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import ProcessorMixin, TrainerCallback
from trl import DistillationTrainer
from trl.trainer.utils import RepeatSampler

from vgs_kernels import VGSObjective

from ..data.answers import answers_match
from ..models.groups import response_lengths
from ..objectives.eta import SteeringState, gradient_norm
from .base import VGSHost
from .batching import select_responses
from .checkpoints import ExactResume, check_writable
from .micro_batch import MicroBatch
from .prior import KeepsPrior
from .rollouts import SampledAnswers, expand_images_once, sampled_groups
from .settings import VGSConfig


class VGSTrainer(KeepsPrior, VGSHost, SampledAnswers, ExactResume, DistillationTrainer):
    """On-policy distillation with Visual Gradient Steering (arXiv 2606.00564).

    Args:
        model: the student, a vision-language model or its id.
        teacher_model: the teacher, with the student's vocabulary and image tokens, or its id.
        args: a ``VGSConfig``.
        train_dataset, eval_dataset: samples with ``prompt`` (chat messages), ``images`` (list of PIL images) and, for
            the accuracy, ``answer`` (str).
        processing_class: the student's processor; None loads it.
        scorer: ``scorer(response_text, gold_answer) -> bool``; None compares the final answers
            (``vgs.data.answers.answers_match``).
        callbacks, optimizers, quantization_config, peft_config: as in TRL.
        tools: not supported.

    Raises:
        TypeError: ``args`` is not a ``VGSConfig``, or ``processing_class`` is not a processor with images.
        ValueError: ``tools`` given, no teacher, different image tokens, or ``eta="measure"`` with sharded parameters.
    """

    _tag_names = ("trl", "distillation", "vgs")
    _name = "VGS"
    _paper = MappingProxyType(
        {"title": "Decomposed On-Policy Distillation for Vision-Language Reasoning", "id": "2606.00564"}
    )

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module,
        args: VGSConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        scorer: Callable[[str, str], bool] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Sequence[Callable] | None = None,
    ) -> None:
        if not isinstance(args, VGSConfig):
            raise TypeError(f"args must be a VGSConfig, got {type(args).__name__}.")
        check_writable(args.output_dir)
        if tools:
            raise ValueError("tools are not supported: a tool's reply has no text-only view. Pass tools=None.")
        if teacher_model is None and "separate" in self.teachers:
            raise ValueError("teacher_model is needed: its hidden states with and without the image define the loss.")
        if processing_class is not None and not isinstance(processing_class, ProcessorMixin):
            raise TypeError(
                "processing_class must be a processor with an image processor (transformers.ProcessorMixin), got "
                f"{type(processing_class).__name__}: a text-only model has no image to steer towards."
            )
        self.steering = SteeringState()
        self._watched: list[list[float]] = []  # means of this optimizer step's micro-batches
        super().__init__(
            model=model,
            teacher_model=teacher_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), self.steering],
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.scorer = scorer or answers_match
        self._prepare_scoring()
        if self.use_vllm and self.vllm_mode == "colocate":
            expand_images_once(self.vllm_generation, self.model.config.image_token_id)

    def _check_models(self) -> None:
        super()._check_models()
        if self.args.num_generations > 1 and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ValueError(
                f"num_generations={self.args.num_generations} needs a dataset with a length, got "
                f"{type(self.train_dataset).__name__}."
            )

    @property
    def objective(self) -> VGSObjective:
        """The objective in force: eta as fixed or measured so far (1 before the first measurement), lam as due."""
        eta = self.args.fixed_eta
        if eta is None:
            eta = self.steering.eta if self.steering.ratios else 1.0
        objective, every = self.args.objective(eta), self.args.lp_every
        if not self.model.training or every == 1:
            return objective
        return replace(objective, lam=0.0 if self.state.global_step % every else every * objective.lam)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "answer" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "answer"]

    # ---- rollouts

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        """The host's, with every prompt ``num_generations`` times in a row."""
        host, count = super()._get_train_sampler(dataset), self.args.num_generations
        return RepeatSampler(
            host.data_source,
            mini_repeat_count=count,
            batch_size=host.batch_size // count,
            repeat_count=host.repeat_count,
            shuffle=host.shuffle,
            seed=host.seed,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """A sampled batch: prompts with their responses, what the teacher says of them, and the loss's divisor."""
        output = super()._generate_and_score_completions(inputs)
        self._score_answers(inputs, output)
        groups = sampled_groups(
            output,
            [x["prompt"] for x in inputs],
            self.args.num_generations if self.model.training else 1,
            self.processing_class,
            self.placeholder_ids,
            **self.chat_template_kwargs,
        )
        items = output["num_items_in_batch"]
        if self.args.loss_reduction == "trajectory":
            # What the host divides by: responses instead of tokens.
            count = sum(length > 0 for length in response_lengths(groups))
            items = self.accelerator.gather(torch.tensor([count], device=items.device)).sum()
        return {"groups": groups, "views": self._views(inputs, groups), "num_items_in_batch": items}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch, with the teacher's part. As the host's, but responses to one prompt stay together."""
        if not self.model.training:
            return self._with_teacher(self._generate_and_score_completions(generation_batch))
        steps = self.args.gradient_accumulation_steps
        position = self._step % steps
        if position == 0 or self._buffered_inputs is None:
            batch = self._with_teacher(self._generate_and_score_completions(generation_batch))
            size = len(batch["teacher"]) // steps
            self._buffered_inputs = [_part(batch, first, size) for first in range(0, size * steps, size)]
            wanted = 0 if self.args.fixed_eta is not None else self.args.eta_batches
            if len(self.steering.ratios) < wanted:
                self._measure_eta()
        return self._buffered_inputs[position]

    def _measure_eta(self) -> None:
        """One measurement of eta on all micro-batches of this optimizer step (arXiv 2606.00564, Eq. 15)."""
        student = self.accelerator.unwrap_model(self.model)
        parameters = [p for p in student.parameters() if p.requires_grad]

        def losses(objective: VGSObjective) -> Iterator[Tensor]:
            for inputs in self._buffered_inputs:
                batch = self._micro_batch(inputs, inputs["num_items_in_batch"], objective, terms=False)
                for chosen in batch.passes:
                    yield self.step_scorer.pass_loss(student, batch, chosen)[0]

        steered = replace(self.args.objective(1.0), lam=0.0)
        norms = [
            gradient_norm(losses(objective), parameters, lambda x: self.accelerator.reduce(x, reduction="mean"))
            for objective in (replace(steered, gamma=0.0), steered)
        ]
        self.steering.add_ratio(*norms)

    # ---- loss

    def _micro_batch(
        self, inputs: dict[str, Any], num_items: Tensor | float | None, objective: VGSObjective, terms: bool
    ) -> MicroBatch:
        weights = self._token_weights(response_lengths(inputs["groups"]), num_items)
        return self.step_scorer.micro_batch(inputs["groups"], inputs["teacher"], weights, objective, terms)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch. All its passes but the last have gone backward already when it returns."""
        training = self.model.training
        num_items = None
        if training:  # per process: gradients are averaged over processes
            num_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        batch = self._micro_batch(inputs, num_items, self.objective, self.args.log_terms)
        loss, outputs = self._loss_in_passes(model, batch)
        self._log(outputs, training)
        return (loss, None) if return_outputs else loss


def _part(batch: dict[str, Any], first: int, size: int) -> dict[str, Any]:
    """Some consecutive responses of a batch."""
    chosen = range(first, first + size)
    return {
        "groups": select_responses(batch["groups"], chosen),
        "teacher": batch["teacher"][first : first + size],
        "num_items_in_batch": batch["num_items_in_batch"],
    }
