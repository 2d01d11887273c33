"""What the Triton kernels share: the logits of a tile inside a kernel, and how tiles are handed to kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import RowTile

#: Warps by vendor, and columns of a block of gradients: 16-byte loads, and no spills. A block of statistics has as many
#: columns as its threads can load at once: more of them for each thread take registers and save few instructions.
STATISTICS_WARPS = {"cuda": 8, "hip": 4}
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, {"cuda": 8, "hip": 8}
_THREADS = {"cuda": 32, "hip": 64}  # of a warp
VENDOR = "cuda" if torch.version.hip is None else "hip"
#: Multiplications and additions are fused, whatever a release of Triton does by default: results stay the same.
OPTIONS = {"enable_fp_fusion": True}
#: A row is cut until there are this many programs for each multiprocessor, twice what runs there at a time; splits
#: keep so many blocks that their start and their merging are small beside them. Whatever their number, they are merged
#: in one compilation.
_PROGRAMS_PER_PROCESSOR, _MIN_SPLIT_BLOCKS, MERGE_LANES = 8, 8, 32
_LOAD_COLUMNS = 16  # what Triton takes for aligned is a multiple of this


class TileArguments(NamedTuple):
    """A tile as kernels take it."""

    rows: list[Tensor]
    strides: list[int]
    n_columns: int
    n_loaded: int
    scalars: list[float]
    options: dict[str, bool]

    @classmethod
    def of(cls, tile: RowTile, *, four: bool = True) -> TileArguments:
        """With ``four``, a pair's own rows stand in for text-only ones, which are not read."""
        rows = [tile.student, tile.target, *([tile.student_text, tile.teacher_text] if tile.four else ())]
        if any(row.stride(1) != 1 and row.shape[1] > 1 for row in rows):
            raise ValueError("rows must be contiguous along the vocabulary.")
        rows = 2 * rows if four and not tile.four else rows
        n_columns = tile.student.shape[1]
        aligned = triton.cdiv(n_columns, _LOAD_COLUMNS) * _LOAD_COLUMNS
        student, target = tile.student_transform, tile.target_transform
        scalars = [student.scale, student.softcap or 1.0, target.scale, target.softcap or 1.0, student.inv_temperature]
        caps = {"STUDENT_CAP": student.softcap is not None, "TARGET_CAP": target.softcap is not None}
        n_loaded, options = aligned if aligned <= tile.readable else n_columns, {**caps, "MASKED": tile.may_be_masked}
        return cls(rows, [row.stride(0) for row in rows], n_columns, n_loaded, scalars, options)


def statistics_layout(vendor: str, itemsize: int, aligned: bool) -> dict[str, int | bool]:
    """How a block's columns are dealt out: 16 contiguous bytes to every thread; of unaligned rows, every LANES-th one.

    Each keeps a thread's columns its own: else threads would have to meet in every block.
    """
    lanes = STATISTICS_WARPS[vendor] * _THREADS[vendor]
    return {"LANES": lanes, "WIDTH": 16 // itemsize if aligned else 4, "INTERLEAVED": not aligned}


def _aligned(rows: Sequence[Tensor], n_loaded: int) -> bool:
    """Whether Triton can load these rows, each at its own pitch, 16 bytes at a time."""
    pitches = [row.stride(0) for row in rows]
    return all(x % _LOAD_COLUMNS == 0 for x in (n_loaded, *pitches)) and all(x.data_ptr() % 16 == 0 for x in rows)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; of any other device one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def splits(n_rows: int, n_blocks: int, multiprocessors: int) -> tuple[int, int]:
    """Split-K: into how many parts to cut each of ``n_rows`` rows of ``n_blocks`` column blocks; blocks of a part."""
    wanted = max(1, _PROGRAMS_PER_PROCESSOR * multiprocessors // n_rows)
    count = max(1, min(wanted, n_blocks // _MIN_SPLIT_BLOCKS, MERGE_LANES - 1))
    blocks = triton.cdiv(n_blocks, count)
    return triton.cdiv(n_blocks, blocks), blocks


def statistics_launch(x: TileArguments) -> tuple[dict[str, int | bool], int, int]:
    """Layout of a sweep that only reads, number of splits of a row, and blocks of a split."""
    layout = statistics_layout(VENDOR, x.rows[0].element_size(), _aligned(x.rows, x.n_loaded))
    n_blocks = triton.cdiv(x.n_columns, layout["LANES"] * layout["WIDTH"])
    return layout, *splits(len(x.rows[0]), n_blocks, multiprocessors(x.rows[0].device))


_LOG2_E = tl.constexpr(1.4426950408889634)
#: A logit that has no weight beside any other, but is finite, so that differences of such logits are.
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def exp(x):
    # tl.exp spends three more instructions on results below 2^-126; these become 0.
    return tl.exp2(x * _LOG2_E)


@triton.jit
def log(x):
    # As exp: right to 2e-7 near 1, where the result is small, and to rounding elsewhere.
    return tl.log2(x) * (1 / _LOG2_E)


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) cancels near zero; there, the odd series.
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(x2 < 0.0625, series, 1 - 2 / (exp(2 * x) + 1))


@triton.jit
def transform(x, columns, n_columns, scale, softcap, inv_temperature, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """layout.LogitTransform of logits as they lie in a tile; nothing behind its end."""
    if HAS_CAP:
        capped = _tanh(x * (scale / softcap)) * (softcap * inv_temperature)
        x = tl.where(x == float("-inf"), x, capped) if MASKED else capped
    else:
        x *= scale * inv_temperature
    return tl.where(columns < n_columns, x, float("-inf") if MASKED else NOTHING)


@triton.jit
def anchored(maximum, MASKED: tl.constexpr):
    """What a row is centred at: its maximum, or 0 as long as all columns are masked."""
    return tl.where(maximum == float("-inf"), 0.0, maximum) if MASKED else maximum


@triton.jit
def lane_sum(x):
    """[LANES, WIDTH] -> [LANES]: a thread's own elements."""
    return tl.sum(x, axis=1)


@triton.jit
def cap_slope(z, softcap, inv_temperature):
    """Derivative of the soft-cap; the linear gain is already in the token weights."""
    capped = z * (1 / (softcap * inv_temperature))
    return tl.maximum(1 - capped * capped, 0.0)  # 0 where z is no logit but a mask, or lies behind the tile's end


@triton.jit
def load(
    pointer, columns, n_columns, n_loaded, scale, softcap, inv_temperature, HAS_CAP: tl.constexpr, MASKED: tl.constexpr
):
    x = tl.load(pointer + columns, mask=columns < n_loaded).to(tl.float32)
    return transform(x, columns, n_columns, scale, softcap, inv_temperature, HAS_CAP, MASKED)


@triton.jit
def steered(a, t, w, MASKED: tl.constexpr):
    """q' = a' + (t' - w'), and -inf where any of the three is."""
    steered = a + (t - w)
    return tl.where(w == float("-inf"), float("-inf"), steered) if MASKED else steered
