"""What stops a run before it starts: models, data and settings that do not fit together."""

from __future__ import annotations

from types import NoneType
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..data.messages import has_evidence
from ..errors import ConfigError
from ..models.families import device_of, placeholder_ids
from ..models.heads import read_head
from ..models.states import final_states
from ..models.wrappers import is_sharded
from ..objectives.definitions import Preset
from ..teachers.protocol import TeacherFacts
from .settings import VGSOptions
from .step import UNSHARDED

#: Of the largest logit: more than rounding to 16 bit (also by the model's own autocast), less than a wrong factor.
LOGIT_TOLERANCE = 0.05
EVIDENCE_ROWS = 100  # that are read to see whether prompts mark any


def check_teacher_kind(preset: Preset, kinds: tuple[str, ...], trainer: str) -> None:
    """Stop where a preset wants another kind of teacher.

    Args:
        preset: of the run.
        kinds: of ``vgs.objectives.presets.TEACHERS``, those that the trainer has.
        trainer: its class's name.

    Raises:
        ConfigError: another kind.
    """
    if preset.teacher not in kinds:
        raise ConfigError(
            f"preset={preset.name!r} has a teacher of kind {preset.teacher!r}, which {trainer} has not "
            f"({', '.join(kinds)}). Use vgs.VGSTrainer for a separate teacher and "
            "vgs.trainers.self_distillation.SelfDistillationTrainer for the student's own weights."
        )


def check_top_k(preset: Preset, vocabulary: int) -> None:
    """Stop where a preset looks at more tokens than there are.

    Raises:
        ConfigError: ``top_k`` above ``vocabulary``, the number of columns in use.
    """
    if (preset.divergence.top_k or 0) > vocabulary:
        raise ConfigError(
            f"preset={preset.name!r} looks at the top_k={preset.divergence.top_k} likeliest tokens, but the "
            f"vocabulary has {vocabulary}. Set divergence: {{top_k: ...}}."
        )


def check_overlap(k: int | None, vocabulary: int) -> None:
    """Stop where more likeliest tokens are to be compared than there are.

    Raises:
        ConfigError: ``log_overlap`` above ``vocabulary``, the number of columns in use.
    """
    if (k or 0) > vocabulary:
        raise ConfigError(f"log_overlap must be at most {vocabulary}, the columns in use, got {k}.")


def check_columns_for(preset: Preset, data: Any, needs_text: bool) -> None:
    """Stop where a preset needs images, or evidence of any kind, and the data have none.

    Args:
        preset: of the run.
        data: the training data; a stream is not read.
        needs_text: whether the run compares prompts with and without evidence.

    Raises:
        ConfigError: neither a column ``images`` (or TRL's ``image``) nor evidence in the first prompts.
    """
    if has_column(data, "images") or has_column(data, "image") or marks_evidence(data):
        return
    if "control" in preset.views:
        raise ConfigError(f"preset={preset.name!r} degrades images, but train_dataset has no column 'images'.")
    if needs_text:
        raise ConfigError(
            f"preset={preset.name!r} compares prompts with and without images, but train_dataset has no column "
            "'images' and no part of a prompt marked as evidence. Use the preset 'opd', or gamma=0 and lam=0."
        )


def marks_evidence(data: Any) -> bool:
    """Whether a prompt of the data has evidence, as far as its first rows tell; of a stream nothing is known."""
    count = min(len(data), EVIDENCE_ROWS) if hasattr(data, "__len__") else 0
    return count == 0 or any(has_evidence(data[index].get("prompt") or "") for index in range(count))


def has_column(data: Any, name: str) -> bool:
    """Whether a dataset has a column, as far as it can be known without reading a stream."""
    if hasattr(data, "__len__"):  # a transformed dataset names its columns otherwise
        return len(data) == 0 or name in data[0]
    names = getattr(data, "column_names", None)
    return names is None or name in names


def check_processor(processor: Any) -> None:
    """Stop at anything but a processor, or a text-only model's tokenizer; None is loaded later.

    Raises:
        TypeError: such a thing.
    """
    if not isinstance(processor, (ProcessorMixin, PreTrainedTokenizerBase, NoneType)):
        raise TypeError(
            "processing_class must be a processor with an image processor (transformers.ProcessorMixin), or the "
            f"tokenizer of a text-only model, got {type(processor).__name__}."
        )


def check_student(student: nn.Module, has_processor: bool, needs_images: bool) -> None:
    """Stop where a student takes no images but its objective needs some.

    Args:
        student: the unwrapped model.
        has_processor: whether the student's processor takes images.
        needs_images: whether the objective compares prompts with and without images, which are the only evidence.

    Raises:
        ConfigError: such a model.
    """
    own = placeholder_ids(student.config)
    if own and not has_processor:
        raise ConfigError(f"processing_class must be the processor of {type(student).__name__}, got its tokenizer.")
    if needs_images and not own:
        raise ConfigError(
            f"model must be a vision-language model, got {type(student).__name__}: this objective compares prompts "
            "with and without images. Use the preset 'opd' or 'gkd' for a text-only model, or mark evidence in prompts."
        )


def check_placeholders(student: nn.Module, facts: TeacherFacts) -> None:
    """Stop where a teacher reads images from other tokens than the student.

    Args:
        student: the unwrapped model.
        facts: the teacher's.

    Raises:
        ConfigError: other tokens.
    """
    own, theirs = placeholder_ids(student.config), facts.placeholder_ids
    if theirs != own:
        raise ConfigError(
            f"{facts.what} has image and video token ids {theirs}, the student {own}; both must read the same prompts."
        )


@torch.no_grad()
def check_logits(name: str, model: nn.Module, ids: Tensor) -> None:
    """Stop where the loss would read other logits than those that a model is sampled from.

    One short prompt goes through the model, and through its body and its head as we read them. Sharded models are not
    asked: outside their wrappers they have no weights.

    Args:
        name: of the argument, for the message.
        model: unwrapped.
        ids: [T] int64, a text.

    Raises:
        ConfigError: other logits.
    """
    if is_sharded(model) or any(x.is_meta for x in model.parameters()):
        return
    inputs = {"input_ids": ids[None].to(device_of(model))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    training = model.training
    model.eval()
    try:
        logits = getattr(model(**inputs, use_cache=False), "logits", None)
        if logits is None:  # a patched forward that keeps them to itself
            return
        rows = final_states(model, **inputs)[0, -1:]
    finally:
        model.train(training)
    own = logits[0, -1:].float()
    if own.isnan().any():  # weights that are to come from another rank
        return
    read = read_head(model, rows.dtype).logits(rows.to(own.device))
    own, read = (x[own.isfinite()] for x in (own, read))  # some families mask columns
    gap, size = (read - own).abs().max().item(), own.abs().max().item()
    if not gap <= LOGIT_TOLERANCE * size:
        raise ConfigError(
            f"{name}, a {type(model).__name__}, has logits of up to {size:.4g}, but its output head applied to its "
            f"final hidden states gives others, off by {gap:.4g}: this family is not supported."
        )


def check_engine(args: VGSOptions, teacher: nn.Module | None, kind: DistributedType, fsdp2: bool = False) -> None:
    """Stop where settings need parameters otherwise than the run has them.

    Args:
        args: of the run.
        teacher: the unwrapped teacher; None for one that does not run here.
        kind: what holds the parameters.
        fsdp2: whether it is FSDP2.

    Raises:
        ConfigError: an offloaded teacher that is sharded or quantized; eta measured on parameters that DeepSpeed or
            FSDP1 shards, or through reentrant checkpointing.
    """
    # The host shards the teacher under DeepSpeed alone; FSDP leaves it whole on every rank.
    if args.teacher_offload and kind == DistributedType.DEEPSPEED:
        raise ConfigError(
            "teacher_offload=True needs a whole teacher, but DeepSpeed holds its parameters. Use DeepSpeed's own "
            "offloading to the CPU."
        )
    if args.teacher_offload and getattr(teacher, "is_quantized", False):
        raise ConfigError("teacher_offload=True cannot move a quantized teacher. Use one of the two.")
    if args.fixed_eta is not None or (args.eta == "cheap" and args.eta_every is None):
        return
    checkpointing = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {})
    if checkpointing and checkpointing.get("use_reentrant"):
        raise ConfigError(
            f"eta={args.eta!r} needs gradient checkpointing that is not reentrant. Set use_reentrant to false in "
            "gradient_checkpointing_kwargs, or eta to a number."
        )
    if kind not in UNSHARDED and not fsdp2:
        raise ConfigError(
            f"eta={args.eta!r} needs parameters that are whole or sharded by FSDP2, but {kind} holds them here. "
            'Measure once elsewhere and set eta to that number, or use "paper-2b", "paper-4b" or "cheap".'
        )
