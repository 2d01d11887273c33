"""The rows in compiled loops (loops.c), for CPUs: rows_torch.py and entries_torch.py in a fifth of their time.

An operator of PyTorch reads and writes memory once for each operation, and all its threads wait for the slowest; a loop
reads a row once, whatever is computed of it. The loops are compiled by the system's C compiler when they are first
needed, and kept in the user's cache. Without a compiler, and for what the loops do not know (soft-caps, other dtypes
than float32, clips of entries, tails), PyTorch's rows take their place.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..divergence import Divergence
from . import entries_torch, rows_torch
from .layout import LARGE, SATURATED, RowCoefficients, RowTile, RunningStatistics, Statistics, anchor, named

_SOURCE = Path(__file__).with_name("loops.c")
_FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros -shared -fPIC".split()
_KINDS = ("reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None where they cannot be compiled, which is said once."""
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"vgs_kernels: losses on a CPU run in PyTorch's operators, which are slower: {_SOURCE.name} could not be "
            f"compiled ({reason.strip().splitlines()[0]}). A C compiler with OpenMP helps, or CC to name one.",
            stacklevel=2,
        )
        return None


def _built() -> Path:
    """The shared library for this source, compiler and processor."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler found")
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    key = hashlib.sha256("\n".join([_SOURCE.read_text(), version, *_FLAGS, _processor()]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgs_kernels"
    target = folder / f"loops-{key}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / target.name
            command = [compiler, *_FLAGS, "-o", str(built), str(_SOURCE), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            built.replace(target)  # whole or not at all, also where several processes build it
    return target


def _processor() -> str:
    """What ``-march=native`` depends on: folders may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def supports(tile: RowTile, state: Tensor, *outs: Tensor | None) -> bool:
    """Whether the loops can work on a tile and write to ``outs``."""
    tensors = [tile.student, tile.target, tile.student_text, tile.teacher_text, *outs]
    capped = tile.student_transform.softcap is not None or tile.target_transform.softcap is not None
    return (
        not capped
        and state.dtype == torch.float32
        and all(x is None or (x.dtype == torch.float32 and x.stride(1) == 1) for x in tensors)
        and library() is not None
    )


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(_address(x))


def _arguments(tile: RowTile) -> list[object]:
    """rows, strides, n, columns, gains, masked, threads."""
    rows = [tile.student, tile.target, *([tile.student_text, tile.teacher_text] if tile.four else [])]
    n, columns = tile.student.shape
    return [
        (ctypes.c_void_p * len(rows))(*(x.data_ptr() for x in rows)),
        (ctypes.c_int64 * len(rows))(*(x.stride(0) for x in rows)),
        ctypes.c_int64(n),
        ctypes.c_int64(columns),
        (ctypes.c_float * 2)(tile.student_transform.gain, tile.target_transform.gain),
        ctypes.c_int(tile.may_be_masked),
        ctypes.c_int(torch.get_num_threads()),
    ]


def _table(state: Tensor, values: Sequence[Tensor | float | None]) -> Tensor:
    """[R, len(values)] scalars of each token; None stands for 0."""
    table = state.new_zeros(state.shape[1], len(values))
    for column, value in zip(table.t(), values, strict=True):
        if value is not None:
            column.copy_(value) if isinstance(value, Tensor) else column.fill_(value)
    return table


def statistics(tile: RowTile, state: Tensor) -> None:
    """``rows_torch.statistics``."""
    if not supports(tile, state):
        return rows_torch.statistics(tile, state)
    found = torch.empty(state.shape[1], len(state), dtype=torch.float64)
    call = library().four_statistics if tile.four else library().pair_statistics
    call(*_arguments(tile), _pointer(found))
    before, here = RunningStatistics(state), RunningStatistics(found.t().to(state.dtype))
    maxima = torch.maximum(before.common_maxima(), here.common_maxima())
    for x in (before, here):
        x.rescale_to(maxima)
    for total, value in zip(before.addends(), here.addends(), strict=True):
        total.add_(value)


def totals(
    tile: RowTile, state: Tensor, divergence: Divergence, limit: Tensor | None, sums: Tensor, tails: Tensor
) -> None:
    """``entries_torch.totals``."""
    if limit is not None or divergence.clip is not None or not supports(tile, state):
        return entries_torch.totals(tile, state, divergence, limit, sums, tails)
    table, kind = _of_pair(state, divergence, [None, None, None, None, LARGE])
    found = torch.empty(state.shape[1], len(sums), dtype=torch.float64)
    library().pair_totals(*_arguments(tile), _pointer(table), *kind, _pointer(found))
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
    clipped = divergence is not None and (divergence.clip is not None or coefficients.limit is not None)
    if clipped or not supports(tile, state, out, out_text):
        return entries_torch.gradient(tile, state, divergence, coefficients, out, out_text)
    x = coefficients
    outs = [out, out_text if x.live_prior else None]
    pointers, strides = (ctypes.c_void_p * 2)(*map(_address, outs)), (ctypes.c_int64 * 2)(*map(_stride, outs))
    if tile.four:
        of = named(state)
        anchors = [anchor(of[f"{name}_max"]) for name in "stawq"]
        scales = [of["s_sum"].reciprocal(), of["q_sum"].reciprocal()]
        table = _table(state, [*anchors, *scales, x.weight, x.mean, x.gamma, x.policy])
        library().four_gradient(*_arguments(tile), _pointer(table), _pointer(x.chosen), pointers, strides)
    else:
        table, kind = _of_pair(state, divergence, [x.weight, x.mean, x.top, x.policy, SATURATED])
        library().pair_gradient(*_arguments(tile), _pointer(table), _pointer(x.chosen), *kind, pointers, strides)


def _of_pair(state: Tensor, divergence: Divergence, scalars: Sequence[Tensor | float | None]) -> tuple[Tensor, list]:
    """The table of a pair's scalars, and the kind of a divergence and its beta."""
    x = named(state)
    anchors = [anchor(x["s_max"]), anchor(x["t_max"])]
    scales = [x["s_sum"].reciprocal(), x["t_sum"].reciprocal()]
    table = _table(state, [*anchors, *scales, Statistics(state).log_sums, *scalars])
    return table, [ctypes.c_int(_KINDS.index(divergence.kind)), ctypes.c_float(divergence.beta)]
