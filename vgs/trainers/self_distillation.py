"""SelfDistillationTrainer: a student learns from itself with privileged context, on its own responses.

Visual-OPSD (arXiv 2606.18974), OPSD (2601.18734) and Vision-OPD (2605.18740) are presets of it: the teacher has the
student's weights (as they are, as they were, or averaged) and sees what the student does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import ProcessorMixin, TrainerCallback

from ..data.privileged import COLUMNS, CONTROLS, MODES, check_columns, privileged_groups
from ..errors import ConfigError
from ..models.averaged import StudentCopy
from ..models.groups import PromptGroup
from ..models.heads import Head, whole_heads
from ..objectives.presets import find_preset
from ..teachers.local import LocalTeacher
from .distillation import VGSTrainer
from .prior import CopyFollower
from .routes import local_options
from .settings import VGSConfig
from .step import UNSHARDED

FULL_VOCABULARY = MappingProxyType({"support": "full", "top_k": None, "plausibility": None, "clip": None})


@dataclass
class SelfDistillationConfig(VGSConfig):
    """Settings of ``SelfDistillationTrainer``: those of ``VGSConfig`` and what the teacher is and sees.

    Other defaults than the host's, as published for Visual-OPSD: the learning rate rises over the first fifth of the
    steps (200 of 1,000) to 1e-5 and falls as a cosine to a hundredth.

    Args:
        preset: a preset with a privileged view: ``"visual_opsd"``, ``"opsd"`` or ``"vision_opd"``.
        full_vocabulary: sum the divergence over the whole vocabulary, without clip, instead of the preset's support.
            None: for ``"visual_opsd"`` yes (False is the published form) unless ``divergence`` names support, top_k or
            clip, for others no.
        teacher: ``"live"`` (the student itself), ``"frozen"`` (its initial weights; of a PEFT student the base without
            the adapter) or ``"ema"`` (its average, see ``ema_decay``). None: as the preset says.
        ema_decay: of the average, per optimizer step: copy <- decay * copy + (1 - decay) * student. None: the preset's.
        privileged_mode: ``"add"`` shows the teacher the privileged images after the sample's own, ``"replace"`` in
            their place.
        privileged_control: ``"noise"`` replaces the privileged images by Gaussian noise of the same sizes.
        learning_rate: the greatest learning rate.
        lr_scheduler_type: how it falls, as in transformers.
        warmup_steps: over which it rises; below 1 a share of all steps.

    Raises:
        ConfigError: a preset without privileged view, an unknown teacher, mode or control, or an ``ema_decay`` outside
            [0, 1).
    """

    preset: str = field(default="visual_opsd", metadata={"help": "What is minimised: a preset's name."})
    full_vocabulary: bool | None = field(default=None, metadata={"help": "The whole vocabulary, without clip."})
    teacher: str | None = field(default=None, metadata={"help": '"live", "frozen" or "ema".'})
    ema_decay: float | None = field(default=None, metadata={"help": "Of the averaged teacher, per step."})
    privileged_mode: str = field(default="add", metadata={"help": 'Privileged images: "add" or "replace".'})
    privileged_control: str | None = field(default=None, metadata={"help": '"noise" for privileged images.'})
    learning_rate: float = field(default=1e-5, metadata={"help": "The greatest learning rate."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Schedule of the rate."})
    warmup_steps: float = field(default=0.2, metadata={"help": "Steps, or below 1 the share of all steps."})

    def __post_init__(self) -> None:
        preset = find_preset(self.preset)
        self._resolve(preset)
        if "privileged" not in preset.views:
            raise ConfigError(
                f"preset must be one with privileged context (visual_opsd, opsd, vision_opd), got {self.preset!r}."
            )
        self.teacher = preset.teacher if self.teacher is None else self.teacher
        if self.ema_decay is None:
            self.ema_decay = 0.995 if preset.ema_decay is None else preset.ema_decay
        named = {"support", "top_k", "clip"} & set(self.divergence or ())
        if self.full_vocabulary is None:
            self.full_vocabulary = self.preset == "visual_opsd" and not named
        elif self.full_vocabulary and "top_k" in named and "support" not in named:
            raise ConfigError(
                f"divergence has top_k={self.divergence['top_k']!r}, which needs full_vocabulary=False or a support."
            )
        StudentCopy(self.teacher, self.ema_decay)  # validates both
        for name, choices in (("privileged_mode", MODES), ("privileged_control", (None, *CONTROLS))):
            if getattr(self, name) not in choices:
                expected = " or ".join(repr(choice) for choice in choices)
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)!r}.")
        for name in ("teacher_offload", "teacher_reload"):
            if getattr(self, name):
                raise ConfigError(f"{name} must be False: the teacher lives in the student's own modules.")
        if self.lr_scheduler_type == "cosine_with_min_lr" and not self.lr_scheduler_kwargs:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.01}
        super().__post_init__()

    def _divergence_changes(self) -> dict[str, Any]:
        return {**(FULL_VOCABULARY if self.full_vocabulary else {}), **super()._divergence_changes()}


@dataclass
class SelfTeacher(LocalTeacher):
    """A teacher in the student's own modules.

    Attributes:
        copy: the teacher's weights.
    """

    copy: StudentCopy = field(kw_only=True)

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.copy.in_place(self.unwrapped):
            yield

    @contextmanager
    def head(self, dtype: torch.dtype) -> Iterator[Head]:
        with whole_heads(self.unwrapped):
            yield self.copy.head(self.unwrapped, dtype)


class TeachInEngine(TrainerCallback):
    """The teacher runs in whatever engine holds the student, which has none before the training begins.

    Args:
        trainer: whose teacher is a ``SelfTeacher``.
    """

    def __init__(self, trainer: SelfDistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer, scorer = self.trainer, self.trainer.step_scorer
        scorer.teachers[""].model = trainer.model_wrapped if scorer.sharded else trainer.student


class SelfDistillationTrainer(VGSTrainer):
    """On-policy self-distillation: the teacher has the student's weights and privileged context.

    Args:
        model: the student, a vision-language model or its id.
        args: a ``SelfDistillationConfig``.
        train_dataset, eval_dataset: as of ``VGSTrainer``, with privileged columns (``vgs.data.privileged``).
        processing_class, scorer, callbacks, optimizers, quantization_config, peft_config: as of ``VGSTrainer``.

    Attributes:
        copy: the teacher's weights, a ``StudentCopy``; checkpoints hold them.

    Raises:
        TypeError: ``args`` is not a ``SelfDistillationConfig``.
        ConfigError: a dataset without privileged columns, or a teacher that cannot follow sharded weights.
    """

    teachers = ("frozen", "ema")
    extra_columns = (*VGSTrainer.extra_columns, *COLUMNS)
    _tag_names = ("trl", "distillation", "vgs", "self-distillation")
    _name = "Visual-OPSD"
    _paper = MappingProxyType(
        {
            "title": "Visual-OPSD: Cross-Modal On-Policy Self-Distillation for Efficient Unified Multimodal Reasoning",
            "id": "2606.18974",
        }
    )

    def __init__(
        self,
        model: str | nn.Module,
        args: SelfDistillationConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        scorer: Callable[[str, str], bool] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if not isinstance(args, SelfDistillationConfig):
            raise TypeError(f"args must be a SelfDistillationConfig, got {type(args).__name__}.")
        for name, data in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            for part in data.values() if isinstance(data, dict) else [data]:
                if part is not None:
                    check_columns(part, name, f"preset={args.preset!r}", args.privileged_control)
        super().__init__(
            model=model,
            teacher_model=None,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            scorer=scorer,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )

    def make_teachers(self) -> dict[str, SelfTeacher]:
        """The student's own modules, with the teacher's weights in them."""
        self.copy = StudentCopy(self.args.teacher, self.args.ema_decay)
        self.add_callback(TeachInEngine(self))
        CopyFollower(self, self.copy)
        sharded = self.accelerator.distributed_type not in UNSHARDED
        options = local_options(self.args, self.anchor) | {"sharded": sharded}
        return {"": SelfTeacher(self.student, **options, copy=self.copy)}

    def further_views(self, samples: list[dict[str, Any]], groups: list[PromptGroup]) -> dict[str, list[PromptGroup]]:
        """As of ``VGSTrainer``, with the teacher's view, ``"privileged"``."""
        seen = privileged_groups(
            self.processing_class,
            samples,
            groups,
            self.placeholder_ids,
            self.accelerator.device,
            mode=self.args.privileged_mode,
            control=self.args.privileged_control,
            **self.chat_template_kwargs,
        )
        return {**super().further_views(samples, groups), "privileged": seen}
