"""What the trainers share, whatever TRL trainer is below: checks, views, the teacher's phase, the loss in passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import accumulate
from statistics import fmean
from typing import Any

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vgs_kernels import DivergenceOutput, VGSOutput

from ..data.degraded import control_groups
from ..data.prompts import anchor_group
from ..errors import ConfigError
from ..models.families import freeze, is_verified, placeholder_ids
from ..models.groups import PromptGroup
from ..objectives.weighting import token_weights
from .micro_batch import MicroBatch, mean_terms
from .rollouts import forbid_tokens
from .step import UNSHARDED, StepScorer, run_inside


def samples_of(inputs: Sequence[dict[str, Any]], groups: Sequence[PromptGroup]) -> list[dict[str, Any]]:
    """The sample of each group, of one per response."""
    ends = accumulate(len(group.responses) for group in groups)
    return [inputs[end - 1] for end in ends]


class VGSHost:
    """Mixin in front of a TRL trainer that has sampled responses and holds a teacher.

    It reads ``model``, ``teacher_model``, ``args`` (with ``VGSOptions``), ``accelerator``, ``processing_class``,
    ``chat_template_kwargs``, ``train_dataset``, ``current_gradient_accumulation_steps``, ``steering`` (a
    ``SteeringState``), the private ``_tokenizer``, ``_is_vlm``, ``_metrics`` and ``_watched`` (an empty list), and the
    property ``objective`` (the ``VGSObjective`` in force).

    Attributes:
        teachers: kinds of teacher (``vgs.objectives.presets.TEACHERS``) whose presets the trainer can run.
        placeholder_ids: image and video tokens, which are never sampled.
        step_scorer: runs student and teacher.
    """

    teachers: tuple[str, ...] = ("separate",)

    def _prepare_scoring(self) -> None:
        """Check the models and make ``step_scorer``; after the host's ``__init__``."""
        self.placeholder_ids = placeholder_ids(self.model.config)
        self._check_preset()
        self._check_models()
        forbid_tokens(self, self.placeholder_ids)
        student = self.accelerator.unwrap_model(self.model)
        freeze(student, vision=self.args.freeze_vision, embeddings=self.args.freeze_embeddings)
        self.step_scorer = self._make_scorer()

    def _make_scorer(self) -> StepScorer:
        models = [self.accelerator.unwrap_model(x) for x in (self.model, self.teacher_model)]
        packs = all(is_verified(model) for model in models)
        return StepScorer(self.args, self.accelerator, self.teacher_model, self._anchor(), packs)

    # ---- checks

    def _check_preset(self) -> None:
        """Stop where the preset needs what the trainer, the models or the data do not have.

        Raises:
            ConfigError: such a need.
        """
        preset = self.args.preset_in_force
        if preset.teacher not in self.teachers:
            raise ConfigError(
                f"preset={preset.name!r} has a teacher of kind {preset.teacher!r}, which {type(self).__name__} has not "
                f"({', '.join(self.teachers)}). Use vgs.VGSTrainer for a separate teacher and "
                "vgs.trainers.self_distillation.SelfDistillationTrainer for the student's own weights."
            )
        if self.args.prior != "live" and not hasattr(self, "prior"):
            raise ConfigError(f"prior={self.args.prior!r} is not supported by {type(self).__name__}, only 'live'.")
        vocabulary = self.args.vocab_size or self.model.config.get_text_config().vocab_size
        if (preset.divergence.top_k or 0) > vocabulary:
            raise ConfigError(
                f"preset={preset.name!r} looks at the top_k={preset.divergence.top_k} likeliest tokens, but the "
                f"vocabulary has {vocabulary}. Set divergence: {{top_k: ...}}."
            )
        if self._has_column("images"):
            return
        if "control" in preset.views:
            raise ConfigError(f"preset={preset.name!r} degrades images, but train_dataset has no column 'images'.")
        # In GRPO alone the student is compared with itself.
        if self.teacher_model is not self.model and preset.needs_text(self.args.objective(1.0)):
            raise ConfigError(
                f"preset={preset.name!r} compares prompts with and without images, but train_dataset has no column "
                "'images'. Use the preset 'opd', or gamma=0 and lam=0."
            )

    def _has_column(self, name: str) -> bool:
        """Whether the training data has a column, as far as it can be known without reading a stream."""
        data = self.train_dataset
        if hasattr(data, "__len__"):  # a transformed dataset names its columns otherwise
            return len(data) == 0 or name in data[0]
        names = getattr(data, "column_names", None)
        return names is None or name in names

    def _check_models(self) -> None:
        if not self._is_vlm or not self.placeholder_ids:
            raise TypeError(f"model must be a vision-language model with a processor, got {type(self.model).__name__}.")
        teacher = placeholder_ids(self.accelerator.unwrap_model(self.teacher_model).config)
        if teacher != self.placeholder_ids:
            raise ValueError(
                f"teacher_model has image and video token ids {teacher}, the student {self.placeholder_ids}; both must "
                "read the same prompts."
            )
        sharded = self.accelerator.distributed_type not in UNSHARDED
        # The host shards the teacher under DeepSpeed alone; FSDP leaves it whole on every rank.
        if self.args.teacher_offload and self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "teacher_offload=True needs a whole teacher, but DeepSpeed holds its parameters. Use DeepSpeed's own "
                "offloading to the CPU."
            )
        if self.args.teacher_offload and getattr(self.teacher_model, "is_quantized", False):
            raise ValueError("teacher_offload=True cannot move a quantized teacher. Use one of the two.")
        checkpointing = self.args.gradient_checkpointing and (self.args.gradient_checkpointing_kwargs or {})
        if self.args.fixed_eta is None and checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                'eta="measure" needs gradient checkpointing that is not reentrant. Set use_reentrant to false in '
                "gradient_checkpointing_kwargs, or eta to a number."
            )
        if self.args.fixed_eta is None and sharded:
            raise ValueError(
                f'eta="measure" needs whole parameters, but they are sharded ({self.accelerator.distributed_type}). '
                'Measure once on one device or under DDP and set eta to that number, or use "paper-2b" / "paper-4b".'
            )

    def _anchor(self) -> PromptGroup:
        """A prompt with a small image and one token to it."""
        options = {"device": self.accelerator.device, **self.chat_template_kwargs}
        return anchor_group(self.processing_class, self.placeholder_ids, **options)

    # ---- views and the teacher's phase

    def _views(self, inputs: list[dict[str, Any]], groups: list[PromptGroup]) -> dict[str, list[PromptGroup]]:
        """The views that the preset needs beyond ``"image"`` and ``"text"``, with the responses of ``groups``.

        Args:
            inputs: samples, one per response.
            groups: prompts with their responses, in the same order.
        """
        preset = self.args.preset_in_force
        if "control" not in preset.views:
            return {}
        kind, options = self.args.control_kind or preset.control, self.chat_template_kwargs
        samples = samples_of(inputs, groups)
        return {"control": control_groups(self.processing_class, samples, groups, kind, self.args.seed, **options)}

    def _with_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A sampled batch (``groups`` and, where the preset needs them, ``views``) with the ``teacher``'s part in place
        of the views."""
        objective, rest = self.objective, dict(batch)
        text, views = self.step_scorer.needs_text(objective), rest.pop("views", {})
        return {**rest, "teacher": self.step_scorer.score_teacher(batch["groups"], objective, text, views)}

    # ---- loss

    def _token_weights(self, lengths: list[int], num_items: Tensor | float | None) -> list[Tensor]:
        """[T] float32 for every response: what a token counts; ``num_items`` is None in evaluation (this batch)."""
        return token_weights(lengths, self.args.loss_reduction, num_items, self.accelerator.device)

    def _loss_in_passes(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, list[VGSOutput | DivergenceOutput]]:
        """A micro-batch's loss. In training all its passes but the last have gone backward when it returns."""
        training = self.model.training
        student = self.accelerator.unwrap_model(model)
        done, outputs = 0.0, []
        for index, chosen in enumerate(batch.passes):
            last = index + 1 == len(batch.passes)
            with nullcontext() if last or not training else self._without_synchronisation(model):
                task = partial(self.step_scorer.pass_loss, student, batch, chosen)
                loss, output = run_inside(self.step_scorer.redirect, model, student, task)
                value = output.loss.detach()
                outputs.append(replace(output, loss=value))
                if training and not last:
                    self._backward(loss)
            done = done + (loss + (value - loss.detach()) if last else value)  # the value, unrounded by the wrapper
        return done, outputs

    def _backward(self, loss: Tensor) -> None:
        # As the host's own backward: under DeepSpeed the loss is scaled already.
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))

    @contextmanager
    def _without_synchronisation(self, model: nn.Module) -> Iterator[None]:
        """Gradients of the passes inside stay on their rank, and no engine takes them for the step's last."""
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
                yield
        finally:
            state._set_sync_gradients(before)

    def _means(self, outputs: Sequence[VGSOutput | DivergenceOutput]) -> dict[str, float]:
        """What to log of a micro-batch: its means over the tokens of all ranks."""
        objective = self.objective
        values = {"eta": objective.eta, **mean_terms(self.accelerator, outputs, self.args.log_terms)}
        if objective.lam == 0:  # without a gated term, a gate would only tell how the batch was split
            values.pop("gate", None)
        return values

    def _log(self, outputs: list[VGSOutput | DivergenceOutput], training: bool) -> None:
        """Adds a micro-batch to the metrics, and an optimizer step to what is watched for collapse."""
        values = self._means(outputs)
        metrics = self._metrics["train" if training else "eval"]
        for name, value in values.items():
            metrics[name].append(value)
        if training and "student_vds" in values:
            self._watched.append([values[name] for name in ("language", "student_vds", "vds")])
            if len(self._watched) >= self.current_gradient_accumulation_steps:
                self.steering.watch(*[fmean(column) for column in zip(*self._watched, strict=True)])
                self._watched.clear()
