"""Logit rows of a tile: statistics in one sweep, gradients in another: in PyTorch, in C and in Triton side by side.

layout.py has the notation and what all share. rows_torch.py and rows_triton.py take statistics of four rows, those of
the VGS loss, or of a pair; entries_torch.py and entries_triton.py have the divergences of a pair, and all gradients.
rows_loops.py has both, in loops that a C compiler makes. picks_torch.py and picks_triton.py look at single columns and
compute what a gradient takes of each token. What PyTorch's files say is the specification.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from ..active_columns import Passes


class Backend(NamedTuple):
    """Who works on tiles: statistics and gradients of rows, totals of divergences by entries; and between the sweeps,
    logits of single columns and the scalars of a gradient.

    ``rests``: whether statistics include the ``RESTS`` of layout.py. ``skips``: whether totals take ``above``: a larger
    KL of a row without an entry above ``LARGE`` is that of its statistics, and the row is not read again.
    ``passes``: over blocks of gradients; None: those of PyTorch.
    ``assign``: gives slots to tokens without the host, ``text_totals`` are those of their text-only rows, which the
    gradient then takes; None: it cannot.
    """

    statistics: Callable[..., None]
    gradient: Callable[..., None]
    totals: Callable[..., None]
    pick: Callable[..., None]
    token_scalars: Callable[..., tuple[Tensor, Tensor | None]]
    rests: bool = False
    skips: bool = False
    assign: Callable[..., None] | None = None
    text_totals: Callable[..., Tensor] | None = None
    passes: Passes | None = None


def backend(name: str) -> Backend:
    """The backend that a resolved name stands for: ``"torch"``, ``"triton"``, ``"loops"``, or ``"auto"``, the fastest
    that a CPU has.

    Raises:
        ValueError: the loops are asked for and cannot be compiled.
    """
    if name == "auto":
        name = _of_cpu()
    if name != "triton":
        from . import picks_torch as picks
    if name == "torch":
        from . import entries_torch as entries
        from . import rows_torch as rows
    elif name == "loops":
        from . import rows_loops as entries
        from .compile_loops import CannotCompile, library

        rows = entries
        try:
            library()
        except CannotCompile as error:
            raise ValueError(f"backend='loops' needs a C compiler for {error}.") from error
    else:
        from . import entries_triton as entries
        from . import picks_triton as picks
        from . import rows_triton as rows
        from .columns_triton import PASSES
        from .slots_triton import assign
    functions = rows.statistics, entries.gradient, entries.totals, picks.pick, picks.token_scalars
    if name == "triton":
        return Backend(*functions, skips=True, assign=assign, text_totals=entries.text_totals, passes=PASSES)
    return Backend(*functions, rests=name == "loops")


@functools.cache
def _of_cpu() -> str:
    from .compile_loops import CannotCompile, library

    try:
        library()
    except CannotCompile as error:
        warnings.warn(
            "vgs_kernels: losses on this CPU run in PyTorch's operators, which are slower: the loops in C could not be "
            f"compiled ({error}). A C compiler named by CC helps; backend='torch' says that none is wanted.",
            stacklevel=2,
        )
        return "torch"
    return "loops"
