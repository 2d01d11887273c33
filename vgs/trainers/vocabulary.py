"""A teacher whose output head is padded to another number of rows than the student's.

Checkpoints of one family pad their vocabulary differently by size (Qwen2.5-VL: 151,936 rows up to 3B, 152,064 from 7B
on). Their tokens are the same; the loss takes the columns that both have. TRL's own check would refuse such a pair, so
the teacher is loaded and placed here, as TRL does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..models.vocabulary import head_rows
from .host_hooks import create_model_from_path, prepare_deepspeed


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
    return trainer.accelerator.prepare_model(teacher.eval(), evaluation_mode=True)
