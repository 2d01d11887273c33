"""Logit rows of a tile: statistics in one sweep, gradients in another, in PyTorch and in Triton side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Backend(NamedTuple):
    """Who works on tiles: statistics and gradient of rows, and totals and gradient of divergences by entries."""

    statistics: Callable[..., None]
    gradient: Callable[..., None]
    totals: Callable[..., None]
    entry_gradient: Callable[..., None]


def backend(name: str) -> Backend:
    """The backend that a resolved name, ``"torch"`` or ``"triton"``, stands for."""
    if name == "torch":
        from . import entries_torch as entries
        from . import rows_torch as rows
    else:
        from . import entries_triton as entries
        from . import rows_triton as rows
    return Backend(rows.statistics, rows.gradient, entries.totals, entries.gradient)
