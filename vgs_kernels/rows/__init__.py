"""Logit rows of a tile: statistics in one sweep, gradients in another, in PyTorch and in Triton side by side.

layout.py has the notation and what both share. rows_torch.py and rows_triton.py take statistics of four rows, those of
the VGS loss, or of a pair; entries_torch.py and entries_triton.py have the divergences of a pair, and all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Backend(NamedTuple):
    """Who works on tiles: statistics and gradients of rows, and totals of divergences by entries."""

    statistics: Callable[..., None]
    gradient: Callable[..., None]
    totals: Callable[..., None]


def backend(name: str) -> Backend:
    """The backend that a resolved name, ``"torch"`` or ``"triton"``, stands for."""
    if name == "loops":
        from . import rows_loops as rows

        return Backend(rows.statistics, rows.gradient, rows.totals)
    if name == "torch":
        from . import entries_torch as entries
        from . import rows_torch as rows
    else:
        from . import entries_triton as entries
        from . import rows_triton as rows
    return Backend(rows.statistics, entries.gradient, entries.totals)
