"""How many columns the output heads of two models have in common, whose vocabularies may be padded differently."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import ConfigError

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
