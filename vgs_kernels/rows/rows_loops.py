"""The rows in compiled loops (loops.c), for CPUs: what rows_torch.py and entries_torch.py specify, in one reading.

An operator of PyTorch reads and writes memory once for each operation, and all its threads wait for the slowest; a loop
reads a row once, whatever is computed of it. What the loops do not know (logits of other dtypes than float32, clips of
entries, tails) is left to PyTorch's rows.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..divergence import DIVERGENCES, Divergence
from . import entries_torch, rows_torch
from .compile_loops import library
from .layout import (
    LARGE,
    PAIR_RESTS,
    PAIR_STATE,
    SATURATED,
    VGS_RESTS,
    VGS_STATE,
    LogitTransform,
    RowCoefficients,
    RowTile,
    RunningStatistics,
    Statistics,
    anchor,
    named,
)

#: Elements of a row that are worth the start of a thread, some 0.1 ms.
_THREAD_ELEMENTS = 1 << 16


class _Transform(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in ("gain", "inner", "cap")]

    @classmethod
    def of(cls, transform: LogitTransform) -> _Transform:
        if transform.softcap is None:
            return cls(transform.gain, 0, 0)
        return cls(transform.gain, transform.scale / transform.softcap, transform.softcap * transform.inv_temperature)


class _Job(ctypes.Structure):
    _fields_ = [
        ("next", ctypes.POINTER(ctypes.c_int64)),
        ("n", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("rows", ctypes.c_void_p * 4),
        ("strides", ctypes.c_int64 * 4),
        ("student", _Transform),
        ("target", _Transform),
        ("masked", ctypes.c_int64),
    ]


class _Target(ctypes.Structure):
    _fields_ = [
        ("out", ctypes.c_void_p),
        ("text", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("text_stride", ctypes.c_int64),
        ("chosen", ctypes.c_void_p),
    ]


def _rows(tile: RowTile) -> list[Tensor]:
    return [x for x in (tile.student, tile.target, tile.student_text, tile.teacher_text) if x is not None]


def _supports(tile: RowTile, state: Tensor, *outs: Tensor | None) -> bool:
    """Whether the loops can work on a tile and write to ``outs``."""
    tensors = [*_rows(tile), *(x for x in outs if x is not None)]
    return all(x.dtype == torch.float32 and (x.stride(1) == 1 or x.shape[1] <= 1) for x in (state, *tensors))


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def _run(function: Callable[..., None], tile: RowTile, *arguments: object) -> None:
    """Call a loop on all tokens of a tile, in as many threads as PyTorch's operators take.

    The threads are started anew, which a process that was forked can do; they hold what they work on.
    """
    rows, (n, columns) = _rows(tile), tile.student.shape
    job = _Job(
        ctypes.pointer(ctypes.c_int64(0)), n, columns,
        (ctypes.c_void_p * 4)(*(x.data_ptr() for x in rows)), (ctypes.c_int64 * 4)(*(x.stride(0) for x in rows)),
        _Transform.of(tile.student_transform), _Transform.of(tile.target_transform), tile.may_be_masked,
    )  # fmt: skip

    job.kept = rows  # also where an interrupt lets the caller go before the threads

    def work() -> None:
        given = (_pointer(x) if isinstance(x, Tensor) else x for x in arguments)
        function(ctypes.byref(job), *given)

    helpers = [
        threading.Thread(target=work, name="vgs_kernels")
        for _ in range(min(torch.get_num_threads(), n, 1 + n * columns // _THREAD_ELEMENTS) - 1)
    ]
    started = []
    try:
        with contextlib.suppress(RuntimeError):  # no more threads: those that are there do all
            for helper in helpers:
                helper.start()
                started.append(helper)
        work()
    finally:
        for helper in started:
            helper.join()


def _table(state: Tensor, values: Sequence[Tensor | float | None]) -> Tensor:
    """[R, len(values)] scalars of each token; None stands for 0."""
    table = state.new_zeros(state.shape[1], len(values))
    for column, value in zip(table.t(), values, strict=True):
        if value is not None:
            column.copy_(value) if isinstance(value, Tensor) else column.fill_(value)
    return table


def statistics(tile: RowTile, state: Tensor) -> None:
    """``rows_torch.statistics``."""
    if not _supports(tile, state):
        known = len(VGS_STATE if tile.four else PAIR_STATE)
        state[known:] = torch.nan
        return rows_torch.statistics(tile, state[:known])
    names = VGS_STATE + VGS_RESTS if tile.four else PAIR_STATE + PAIR_RESTS
    found = state.new_empty(state.shape[1], len(names), dtype=torch.float64)
    _run(library().four_statistics if tile.four else library().pair_statistics, tile, found)
    merged = state.double()  # maxima of both are summed and subtracted
    before, here = RunningStatistics(merged), RunningStatistics(found.t()[: len(state)])
    maxima = torch.maximum(before.common_maxima(), here.common_maxima())
    for x in (before, here):
        x.rescale_to(maxima)
    for total, value in zip(before.addends(), here.addends(), strict=True):
        total.add_(value)
    state.copy_(merged)


def totals(
    tile: RowTile, state: Tensor, divergence: Divergence, limit: Tensor | None, sums: Tensor, tails: Tensor
) -> None:
    """``entries_torch.totals``."""
    if limit is not None or divergence.clip is not None or not _supports(tile, state):
        return entries_torch.totals(tile, state, divergence, limit, sums, tails)
    table, kind = _of_pair(state, divergence, [None, None, None, None, LARGE])
    found = state.new_empty(state.shape[1], len(sums), dtype=torch.float64)
    _run(library().pair_totals, tile, table, *kind, found)
    sums += found.t()


def gradient(
    tile: RowTile,
    state: Tensor,
    divergence: Divergence | None,
    coefficients: RowCoefficients,
    out: Tensor,
    out_text: Tensor | None = None,
) -> None:
    """``entries_torch.gradient``."""
    x = coefficients
    clipped = divergence is not None and (divergence.clip is not None or x.limit is not None)
    if clipped or not _supports(tile, state, out, out_text):
        return entries_torch.gradient(tile, state, divergence, coefficients, out, out_text)
    chosen = None if x.chosen is None else x.chosen.contiguous()
    text = (out_text.data_ptr(), out_text.stride(0)) if x.live_prior else (None, 0)
    of_policy = None if chosen is None else chosen.data_ptr()
    to = _Target(out.data_ptr(), text[0], out.stride(0), text[1], of_policy)
    to.kept = out, out_text, chosen
    mean, top = x.centre(state)
    if tile.four:
        of = named(state)
        anchors = [anchor(of[f"{name}_max"]) for name in "stawq"]
        scales = [of["s_sum"].reciprocal(), of["q_sum"].reciprocal()]
        table = _table(state, [*anchors, *scales, x.weight, mean, x.gamma, x.policy])
        _run(library().four_gradient, tile, table, ctypes.byref(to))
    else:
        table, kind = _of_pair(state, divergence, [x.weight, mean, top, x.policy, SATURATED])
        _run(library().pair_gradient, tile, table, *kind, ctypes.byref(to))


def _of_pair(state: Tensor, divergence: Divergence, scalars: Sequence[Tensor | float | None]) -> tuple[Tensor, list]:
    """The table of a pair's scalars, and the kind of a divergence and its beta."""
    x = named(state)
    anchors = [anchor(x["s_max"]), anchor(x["t_max"])]
    scales = [x["s_sum"].reciprocal(), x["t_sum"].reciprocal()]
    table = _table(state, [*anchors, *scales, Statistics(state).log_sums, *scalars])
    return table, [ctypes.c_int64(DIVERGENCES.index(divergence.kind)), ctypes.c_float(divergence.beta)]
