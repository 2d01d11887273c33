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
    rows = head_rows(student), head_rows(teacher)
    if vocab_size is not None and vocab_size > min(rows):
        raise ConfigError(
            f"vocab_size must be at most {min(rows)}, got {vocab_size}: the student's head has {rows[0]} rows, the "
            f"teacher's {rows[1]}."
        )
    if vocab_size is not None or rows[0] == rows[1]:
        return vocab_size
    logger.warning(
        "The student's head has %d rows, the teacher's %d: the loss uses the first %d columns (vocab_size).",
        *(*rows, min(rows)),
    )
    return min(rows)


def unknown_to_teacher(student: Any, teacher: Any) -> range:
    """Ids that the student could sample and the teacher cannot read: padding of the student's head alone."""
    return range(head_rows(teacher), head_rows(student))


def load_teacher(teacher: str | nn.Module, args: Any, processes: int) -> nn.Module:
    """A teacher that is given by its id, as TRL's distillation trainer loads it; one that is loaded already as it is.

    Args:
        teacher: the model or its id.
        args: with ``teacher_model_init_kwargs``.
        processes: of the run.

    Raises:
        ConfigError: ``teacher_model_init_kwargs`` given for a loaded model.
    """
    options: Mapping[str, Any] = args.teacher_model_init_kwargs or {}
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
    """A loaded teacher where the run keeps it; the run's ``vocab_size`` becomes what both models have.

    Args:
        trainer: its host has the student and the accelerator.
        teacher: of ``load_teacher``.

    Raises:
        ConfigError: as ``common_vocabulary``.
    """
    args = trainer.args
    args.vocab_size = common_vocabulary(trainer.model.config, teacher.config, args.vocab_size)
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(teacher, trainer.accelerator)
    return trainer.accelerator.prepare_model(teacher, evaluation_mode=True)
