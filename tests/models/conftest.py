"""Real checkpoints, made once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from real_checkpoints import real_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(family, teacher=False)``: the folder of a tiny checkpoint, saved when it is first asked for."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def saved(family: str, teacher: bool = False) -> Path:
        return real_checkpoint(family, folder / f"{family}_{'teacher' if teacher else 'student'}", teacher=teacher)

    return saved
