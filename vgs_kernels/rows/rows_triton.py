"""Statistics of rows in Triton, for CUDA and ROCm; rows_torch.py is the same in PyTorch, layout.py has the notation.

Every sweep streams a tile once. In the statistics sweep a program takes a split of one token's columns (split-K), and
each thread keeps an online softmax of its own columns; they are merged once, behind the last column, so that nothing
waits for other warps on the way. A second, small kernel merges the splits.

Loads are 16 bytes wide whatever the vocabulary: they may reach into the ``readable`` columns behind the tile's end,
whose values do not count. Where a column may be masked (MASKED), every sum follows the same rule as in PyTorch: where a
softmax weight is 0, the gap that it multiplies does not count. Elsewhere all numbers are finite and 0 * gap is 0.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import RowTile
from .triton_common import (
    MERGE_LANES,
    NOTHING,
    OPTIONS,
    STATISTICS_WARPS,
    VENDOR,
    TileArguments,
    anchored,
    exp,
    lane_sum,
    load,
    statistics_launch,
    steered,
)


@triton.jit
def _rescale(maximum, higher, MASKED: tl.constexpr):
    """What a higher maximum means for sums so far: the new anchor, the anchor's shift, the sums' discount."""
    anchor = anchored(higher, MASKED)
    return anchor, anchored(maximum, MASKED) - anchor, exp(maximum - anchor)


@triton.jit
def _centre(x, maximum, MASKED: tl.constexpr):
    """Fold a block into the lanes' maxima: the new ones, the centred block, the anchors' shift, the sums' discount."""
    higher = tl.maximum(maximum, tl.max(x, axis=1))
    anchor, shift, discount = _rescale(maximum, higher, MASKED)
    return higher, x - anchor[:, None], shift, discount


@triton.jit
def _kept(total, sum_before, shift, discount, MASKED: tl.constexpr):
    """What remains of a weighted sum of gaps that was centred at the old anchors."""
    kept = (total + shift * sum_before) * discount
    return tl.where(discount > 0, kept, 0.0) if MASKED else kept


@triton.jit
def _expect(total, sum_before, shift, discount, weights, gap, MASKED: tl.constexpr):
    """Fold a block into a weighted sum of gaps."""
    product = weights * gap
    if MASKED:
        product = tl.where(weights > 0, product, 0.0)
    return _kept(total, sum_before, shift, discount, MASKED) + lane_sum(product)


@triton.jit
def _merge_pair(pointer, stride, s_max, s_sum, t_max, t_sum, s_logit, s_gap, FOUR: tl.constexpr, MASKED: tl.constexpr):
    """Statistics [LANES] of s and t, each lane a block centred at its own anchors: merge them and store them."""
    s_top = tl.max(s_max, axis=0)
    t_top = tl.max(t_max, axis=0)
    _, s_shift, s_discount = _rescale(s_max, s_top, MASKED)
    _, t_shift, t_discount = _rescale(t_max, t_top, MASKED)
    tl.store(pointer, s_top)
    tl.store(pointer + stride, tl.sum(s_sum * s_discount, axis=0))
    tl.store(pointer + 2 * stride, t_top)
    tl.store(pointer + 3 * stride, tl.sum(t_sum * t_discount, axis=0))
    pointer += (10 if FOUR else 4) * stride
    tl.store(pointer, tl.sum(_kept(s_logit, s_sum, s_shift, s_discount, MASKED), axis=0))
    tl.store(pointer + stride, tl.sum(_kept(s_gap, s_sum, s_shift - t_shift, s_discount, MASKED), axis=0))
    return s_shift, s_discount, t_shift, t_discount


@triton.jit
def _merge_text(
    pointer, stride, s_sum, t_sum, s_shift, s_discount, t_shift, t_discount,
    a_max, a_sum, w_max, w_sum, q_max, q_sum, s_prior_gap, s_view_gap, t_view_gap, a_gap, MASKED: tl.constexpr,
):  # fmt: skip
    """What four rows have more than a pair; the order of layout.VGS_STATE."""
    a_top = tl.max(a_max, axis=0)
    w_top = tl.max(w_max, axis=0)
    _, a_shift, a_discount = _rescale(a_max, a_top, MASKED)
    _, w_shift, w_discount = _rescale(w_max, w_top, MASKED)
    q_max += a_shift + t_shift - w_shift
    q_top = tl.max(q_max, axis=0)
    _, _, q_discount = _rescale(q_max, q_top, MASKED)
    prior_gap = _kept(s_prior_gap, s_sum, a_shift - w_shift, s_discount, MASKED)
    s_view_gap = _kept(s_view_gap, s_sum, s_shift - a_shift, s_discount, MASKED)
    t_view_gap = _kept(t_view_gap, t_sum, t_shift - w_shift, t_discount, MASKED)
    tl.store(pointer + 4 * stride, a_top)
    tl.store(pointer + 5 * stride, tl.sum(a_sum * a_discount, axis=0))
    tl.store(pointer + 6 * stride, w_top)
    tl.store(pointer + 7 * stride, tl.sum(w_sum * w_discount, axis=0))
    tl.store(pointer + 8 * stride, q_top)
    tl.store(pointer + 9 * stride, tl.sum(q_sum * q_discount, axis=0))
    tl.store(pointer + 12 * stride, tl.sum(prior_gap, axis=0))
    tl.store(pointer + 13 * stride, tl.sum(s_view_gap, axis=0))
    tl.store(pointer + 14 * stride, tl.sum(t_view_gap, axis=0))
    tl.store(pointer + 15 * stride, tl.sum(_kept(a_gap, a_sum, a_shift - w_shift, a_discount, MASKED), axis=0))


# The numbers of tokens and of columns are no reason to compile again; ``n_loaded`` is, if it is no multiple of 16.
@triton.jit(do_not_specialize=["n_rows", "n_columns", "n_blocks"])
def statistics_kernel(
    s_ptr, t_ptr, a_ptr, w_ptr, s_stride, t_stride, a_stride, w_stride,
    out_ptr, n_rows, n_columns, n_loaded, n_blocks,
    student_scale, student_cap, target_scale, target_cap, inv_temperature,
    FOUR: tl.constexpr, STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, MASKED: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Statistics of ``n_blocks`` blocks of a token's columns, out [splits, K, R]."""
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    if FOUR:
        a_ptr += row * a_stride
        w_ptr += row * w_stride
    begin = tl.program_id(1) * (n_blocks * LANES * WIDTH)
    end = tl.minimum(begin + n_blocks * LANES * WIDTH, n_columns)
    lane = tl.arange(0, LANES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    offsets = lane + column * LANES if INTERLEAVED else lane * WIDTH + column

    zero = tl.zeros([LANES], tl.float32)
    lowest = zero + (float("-inf") if MASKED else NOTHING)
    s_max, s_sum, t_max, t_sum, s_logit, s_gap, t_gap = lowest, zero, lowest, zero, zero, zero, zero
    if FOUR:
        a_max, a_sum, w_max, w_sum, q_max, q_sum = lowest, zero, lowest, zero, lowest, zero
        s_prior_gap, s_view_gap, t_view_gap, a_gap = zero, zero, zero, zero

    for start in range(begin, end, LANES * WIDTH):
        at = start + offsets
        s = load(s_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
        t = load(t_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
        s_max, s, s_shift, s_discount = _centre(s, s_max, MASKED)
        t_max, t, t_shift, t_discount = _centre(t, t_max, MASKED)
        p_s = exp(s)
        p_t = exp(t)
        s_logit = _expect(s_logit, s_sum, s_shift, s_discount, p_s, s, MASKED)
        s_gap = _expect(s_gap, s_sum, s_shift - t_shift, s_discount, p_s, s - t, MASKED)
        if not FOUR:
            t_gap = _expect(t_gap, t_sum, t_shift - s_shift, t_discount, p_t, t - s, MASKED)
        else:
            a = load(a_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
            w = load(w_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
            a_max, a, a_shift, a_discount = _centre(a, a_max, MASKED)
            w_max, w, w_shift, w_discount = _centre(w, w_max, MASKED)
            p_a = exp(a)
            prior_gap = a - w
            if MASKED:  # outside the support of q*, log q* is -inf
                prior_gap = tl.where(w == float("-inf"), float("-inf"), prior_gap)
            s_prior_gap = _expect(s_prior_gap, s_sum, a_shift - w_shift, s_discount, p_s, prior_gap, MASKED)
            s_view_gap = _expect(s_view_gap, s_sum, s_shift - a_shift, s_discount, p_s, s - a, MASKED)
            t_view_gap = _expect(t_view_gap, t_sum, t_shift - w_shift, t_discount, p_t, t - w, MASKED)
            a_gap = _expect(a_gap, a_sum, a_shift - w_shift, a_discount, p_a, a - w, MASKED)
            q_before = q_max + (a_shift + t_shift - w_shift)
            q_max, q, _, q_discount = _centre(steered(a, t, w, MASKED), q_before, MASKED)
            a_sum = a_sum * a_discount + lane_sum(p_a)
            w_sum = w_sum * w_discount + lane_sum(exp(w))
            q_sum = q_sum * q_discount + lane_sum(exp(q))
        s_sum = s_sum * s_discount + lane_sum(p_s)
        t_sum = t_sum * t_discount + lane_sum(p_t)

    out_ptr += tl.program_id(1) * (16 if FOUR else 7) * n_rows + row
    s_shift, s_discount, t_shift, t_discount = _merge_pair(
        out_ptr, n_rows, s_max, s_sum, t_max, t_sum, s_logit, s_gap, FOUR, MASKED
    )
    if not FOUR:
        t_gap = _kept(t_gap, t_sum, t_shift - s_shift, t_discount, MASKED)
        tl.store(out_ptr + 6 * n_rows, tl.sum(t_gap, axis=0))
    else:
        _merge_text(
            out_ptr, n_rows, s_sum, t_sum, s_shift, s_discount, t_shift, t_discount,
            a_max, a_sum, w_max, w_sum, q_max, q_sum, s_prior_gap, s_view_gap, t_view_gap, a_gap, MASKED,
        )  # fmt: skip


MERGE_LAYOUT = {"LANES": MERGE_LANES}


# The number of tokens decides strides and offsets: no recompilation for another batch length.
@triton.jit(
    do_not_specialize=["state_stride", "n_rows", "n_splits"],
    do_not_specialize_on_alignment=["state_ptr", "split_ptr"],
)
def merge_kernel(
    state_ptr, state_stride, split_ptr, n_rows, n_splits, FOUR: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Merge the statistics of a token's splits [n_splits, K, R] with the state, that of earlier tiles."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    inside = lane <= n_splits
    earlier = lane == 0
    split = split_ptr + (lane - 1) * ((16 if FOUR else 7) * n_rows)
    lanes = tl.where(earlier, state_ptr, split) + row
    stride = tl.where(earlier, state_stride, n_rows)
    s_max = tl.load(lanes, mask=inside, other=float("-inf"))
    s_sum = tl.load(lanes + stride, mask=inside, other=0.0)
    t_max = tl.load(lanes + 2 * stride, mask=inside, other=float("-inf"))
    t_sum = tl.load(lanes + 3 * stride, mask=inside, other=0.0)
    gaps = lanes + (10 if FOUR else 4) * stride
    s_logit = tl.load(gaps, mask=inside, other=0.0)
    s_gap = tl.load(gaps + stride, mask=inside, other=0.0)
    state_ptr += row
    if not FOUR:
        t_gap = tl.load(lanes + 6 * stride, mask=inside, other=0.0)
    else:
        a_max = tl.load(lanes + 4 * stride, mask=inside, other=float("-inf"))
        a_sum = tl.load(lanes + 5 * stride, mask=inside, other=0.0)
        w_max = tl.load(lanes + 6 * stride, mask=inside, other=float("-inf"))
        w_sum = tl.load(lanes + 7 * stride, mask=inside, other=0.0)
        q_max = tl.load(lanes + 8 * stride, mask=inside, other=float("-inf"))
        q_sum = tl.load(lanes + 9 * stride, mask=inside, other=0.0)
        s_prior_gap = tl.load(lanes + 12 * stride, mask=inside, other=0.0)
        s_view_gap = tl.load(lanes + 13 * stride, mask=inside, other=0.0)
        t_view_gap = tl.load(lanes + 14 * stride, mask=inside, other=0.0)
        a_gap = tl.load(lanes + 15 * stride, mask=inside, other=0.0)
    tl.debug_barrier()  # the state is read before it is written
    s_shift, s_discount, t_shift, t_discount = _merge_pair(
        state_ptr, state_stride, s_max, s_sum, t_max, t_sum, s_logit, s_gap, FOUR, True
    )
    if not FOUR:
        t_gap = _kept(t_gap, t_sum, t_shift - s_shift, t_discount, True)
        tl.store(state_ptr + 6 * state_stride, tl.sum(t_gap, axis=0))
    else:
        _merge_text(
            state_ptr, state_stride, s_sum, t_sum, s_shift, s_discount, t_shift, t_discount,
            a_max, a_sum, w_max, w_sum, q_max, q_sum, s_prior_gap, s_view_gap, t_view_gap, a_gap, True,
        )  # fmt: skip


def statistics(tile: RowTile, state: Tensor) -> None:
    """Fold a tile into the running statistics ``state`` [K, R] (unit stride along R), in place."""
    x, n_rows = TileArguments.of(tile), len(tile.student)
    layout, count, blocks = statistics_launch(x)
    parts = state.new_empty(count, len(state), n_rows)
    statistics_kernel[(n_rows, count)](
        *x.rows, *x.strides, parts, n_rows, x.n_columns, x.n_loaded, blocks, *x.scalars,
        FOUR=tile.four, **x.options, **layout, num_warps=STATISTICS_WARPS[VENDOR], **OPTIONS,
    )  # fmt: skip
    merge_kernel[(n_rows,)](
        state, state.stride(0), parts, n_rows, count,
        FOUR=tile.four, **MERGE_LAYOUT, num_warps=1, **OPTIONS,
    )  # fmt: skip


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def supports(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device: Triton has no NVIDIA device below capability 8."""
    if is_interpreted():
        return True
    return device.type == "cuda" and (
        torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    )
