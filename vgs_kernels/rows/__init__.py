"""Logit rows of a tile: statistics in one sweep, gradients in another, in PyTorch and in Triton side by side.

layout.py has the notation and what both share. Four rows are the VGS loss (rows_torch.py, rows_triton.py); a pair of
rows is any divergence (entries_torch.py, entries_triton.py).
"""

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
