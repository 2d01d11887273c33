"""The passes over a block of logit gradients that find the columns that matter, in Triton. Each reads the block once.

../active_columns.py has them in PyTorch, and says what they are for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..active_columns import DROPPED_BITS, RUN, Passes, sampled_runs
from .triton_common import GRADIENT_BLOCK, GRADIENT_WARPS, OPTIONS, VENDOR, multiprocessors, splits

#: Rows and columns of a tile, a row for each warp.
BELOW_LAYOUT = {"ROWS": 8, "COLUMNS": 256}
SUMS_LAYOUT = {"BLOCK": GRADIENT_BLOCK}
#: Half the number of bins of a threshold.
_HALF = tl.constexpr(256)
#: Rows that a program goes through, a multiple of a tile's.
_GROUP = 256


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def row_sums_kernel(g_ptr, g_stride, out_ptr, n_rows, n_columns, n_blocks, BLOCK: tl.constexpr):
    """Sums of |g| and of g over ``n_blocks`` blocks of a row's columns, out [splits, 2, R]."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * (n_blocks * BLOCK)
    end = tl.minimum(begin + n_blocks * BLOCK, n_columns)
    sizes = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + row * g_stride + at, mask=at < n_columns, other=0.0).to(tl.float32)
        sizes += tl.abs(g)
        sums += g
    out_ptr += tl.program_id(1) * 2 * n_rows + row
    tl.store(out_ptr, tl.sum(sizes, axis=0))
    tl.store(out_ptr + n_rows, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["n_runs", "allowed"])
def thresholds_kernel(
    g_ptr, g_stride, mass_ptr, out_ptr, n_columns, n_runs, every, allowed,
    RUN: tl.constexpr, SAMPLES: tl.constexpr, DROPPED: tl.constexpr,
):  # fmt: skip
    """The highest bin of a row's shares below which its sample holds no more than is allowed, nor all it has."""
    row = tl.program_id(0).to(tl.int64)
    mass = tl.load(mass_ptr + row)
    sample = tl.arange(0, SAMPLES)
    run = sample // RUN
    at = run * every + sample % RUN
    share = tl.load(g_ptr + row * g_stride + at, mask=(run < n_runs) & (at < n_columns), other=0.0).to(tl.float32)
    share = tl.abs(share) * (1 / tl.where(mass > 0, mass, 1.0))
    total = tl.sum(share, axis=0)
    found = n_runs * 0
    step = found + _HALF
    while step >= 1:
        edge = ((found + step) << DROPPED).to(tl.float32, bitcast=True)
        below = tl.sum(tl.where(share < edge, share, 0.0), axis=0)
        found = tl.where((below <= allowed) & (below < total), found + step, found)
        step = step // 2
    tl.store(out_ptr + row, (found << DROPPED).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["n_rows", "n_group"], do_not_specialize_on_alignment=["token_ptr"])
def below_kernel(
    g_ptr, g_stride, token_ptr, scale_ptr, sum_ptr, most_ptr, n_rows, n_columns, n_group,
    SOME: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of scale * |g|: sums of what is below 1 for each row, out [column blocks, R], and the highest of each column, out
    [groups of rows, C]."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * n_group
    end = tl.minimum(begin + n_group, n_rows)
    most = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        place = row.to(tl.int64)
        if SOME:
            place = tl.load(token_ptr + row, mask=inside, other=0)
        scale = tl.load(scale_ptr + row, mask=inside, other=0.0)
        pointers = g_ptr + (place * g_stride)[:, None] + at[None, :]
        scaled = tl.load(pointers, mask=inside[:, None] & (at < n_columns)[None, :], other=0.0).to(tl.float32)
        scaled = tl.abs(scaled) * scale[:, None]
        most = tl.maximum(most, scaled)
        below = tl.sum(tl.where(scaled < 1, scaled, 0.0), axis=1)
        tl.store(sum_ptr + tl.program_id(0).to(tl.int64) * n_rows + row, below, mask=inside)
    tl.store(most_ptr + tl.program_id(1).to(tl.int64) * n_columns + at, tl.max(most, axis=0), mask=at < n_columns)


def sample_layout(runs: int) -> dict[str, int]:
    """Of ``thresholds_kernel``: all of a row's samples are held at once, and no thread is without any."""
    return {"RUN": RUN, "SAMPLES": RUN * max(triton.next_power_of_2(runs), 16), "DROPPED": DROPPED_BITS}


def row_sums(d_logits: Tensor) -> Tensor:
    """As active_columns.row_sums."""
    rows, columns = d_logits.shape
    count, blocks = splits(max(rows, 1), max(triton.cdiv(columns, GRADIENT_BLOCK), 1), multiprocessors(d_logits.device))
    parts = d_logits.new_empty(count, 2, rows, dtype=torch.float32)
    if rows:
        row_sums_kernel[(rows, count)](
            d_logits, d_logits.stride(0), parts, rows, columns, blocks,
            **SUMS_LAYOUT, num_warps=GRADIENT_WARPS[VENDOR], **OPTIONS,
        )  # fmt: skip
    return parts.sum(0)


def guess(d_logits: Tensor, mass: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """As active_columns.guess, but that nothing is said of how many columns will be kept: to see it costs a pass."""
    rows, columns = d_logits.shape
    every, count = sampled_runs(columns)
    thresholds = torch.empty_like(mass)
    sampled = min(count * RUN, columns)
    if rows:
        thresholds_kernel[(rows,)](
            d_logits, d_logits.stride(0), mass, thresholds, columns, count, every, allowed * (sampled / columns),
            **sample_layout(count), num_warps=GRADIENT_WARPS[VENDOR], **OPTIONS,
        )  # fmt: skip
    return thresholds, mass.new_zeros(())


def sum_below(d_logits: Tensor, tokens: Tensor | None, scale: Tensor, lowest: Tensor) -> Tensor:
    """As active_columns.sum_below."""
    rows, columns = len(scale), d_logits.shape[1]
    blocks, groups = triton.cdiv(columns, BELOW_LAYOUT["COLUMNS"]), triton.cdiv(rows, _GROUP)
    sums, most = scale.new_empty(blocks, rows), scale.new_empty(groups, columns)
    below_kernel[(blocks, groups)](
        d_logits, d_logits.stride(0), scale if tokens is None else tokens, scale, sums, most, rows, columns, _GROUP,
        SOME=tokens is not None, **BELOW_LAYOUT, num_warps=BELOW_LAYOUT["ROWS"], **OPTIONS,
    )  # fmt: skip
    torch.minimum(lowest, -most.amax(0), out=lowest)
    return sums.sum(0)


PASSES = Passes(row_sums, guess, sum_below)
