"""A teacher whose output head is padded to another number of rows than the student's.

Checkpoints of one family pad their vocabulary differently by size (Qwen2.5-VL: 151,936 rows up to 3B, 152,064 from 7B
on). Their tokens are the same; the loss takes the columns that both have. TRL's own check would refuse such a pair, so
the teacher is loaded and placed here, as TRL does it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError
from .host_hooks import create_model_from_path, prepare_deepspeed

logger = logging.getLogger(__name__)


def head_rows(config: Any) -> int:
    """Rows of the output head of a transformers config."""
    return int(config.get_text_config().vocab_size)


def common_vocabulary(student: Any, teacher: Any, vocab_size: int | None) -> int | None:
    """The number of leading vocabulary columns that a loss between two models uses; None: all.

    Args:
        student, teacher: their transformers configs.
        vocab_size: as the user has set it; None: as many as both have, said in one line where that is not all.

    Raises:
        ConfigError: ``vocab_size`` is above what both have.
    """
    return common_rows(student, head_rows(teacher), vocab_size)


def common_rows(student: Any, rows: int, vocab_size: int | None, what: str = "the teacher") -> int | None:
    """As ``common_vocabulary``, with a teacher of which only the number of its head's rows is known.

    Args:
        student: its transformers config.
        rows: of the teacher's head.
        vocab_size: as of ``common_vocabulary``.
        what: the teacher, for messages.

    Raises:
        ConfigError: as ``common_vocabulary``.
    """
    own = head_rows(student)
    name = "the teacher" if what == "teacher_model" else what
    if vocab_size is not None and vocab_size > min(own, rows):
        raise ConfigError(
            f"vocab_size must be at most {min(own, rows)}, got {vocab_size}: the student's head has {own} rows, "
            f"{name}'s {rows}."
        )
    if vocab_size is not None or own == rows:
        return vocab_size
    logger.warning(
        "The student's head has %d rows, %s's %d: the loss uses the first %d columns (vocab_size).",
        *(own, name, rows, min(own, rows)),
    )
    return min(own, rows)


def unknown_to_teachers(student: Any, rows: int) -> range:
    """Ids that the student could sample and a teacher whose head has ``rows`` rows cannot read: padding of the
    student's head alone."""
    return range(rows, head_rows(student))


def load_teacher(
    teacher: str | nn.Module, args: Any, processes: int, own_options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A teacher that is given by its id, as TRL's distillation trainer loads it; one that is loaded already as it is.

    Args:
        teacher: the model or its id.
        args: with ``teacher_model_init_kwargs``.
        processes: of the run.
        own_options: of ``from_pretrained``, in place of ``teacher_model_init_kwargs``.

    Raises:
        ConfigError: ``teacher_model_init_kwargs`` given for a loaded model.
    """
    options: Mapping[str, Any] = own_options or args.teacher_model_init_kwargs or {}
    if not isinstance(teacher, str):
        if options:
            raise ConfigError("teacher_model_init_kwargs must be left out for a teacher_model that is loaded already.")
        return teacher
    revision = getattr(args, "teacher_model_revision", None)
    options = {"dtype": None, **({} if revision is None else {"revision": revision}), **options}
    if processes > 1:
        options["device_map"] = None
    return create_model_from_path(teacher, **{"trust_remote_code": args.trust_remote_code, **options})


def place_teacher(trainer: Any, teacher: nn.Module) -> nn.Module:
    """A loaded teacher where the run keeps it.

    Args:
        trainer: its host has the student and the accelerator.
        teacher: of ``load_teacher``.
    """
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(teacher, trainer.accelerator)
    return trainer.accelerator.prepare_model(teacher, evaluation_mode=True)
