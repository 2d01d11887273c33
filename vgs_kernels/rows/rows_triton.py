"""The rows in Triton, for CUDA and ROCm; rows_torch.py is the same in PyTorch, layout.py has the notation.

Both sweeps stream a tile once. In the statistics sweep a program takes a split of one token's columns (split-K), and
each thread keeps an online softmax of its own columns; they are merged once, behind the last column, so that nothing
waits for other warps on the way. A second, small kernel merges the splits. In the gradient sweep a program takes one
token and one column block.

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

from .layout import PAIR_STATE, VGS_STATE, RowCoefficients, RowTile
from .triton_common import (
    GRADIENT_BLOCK,
    GRADIENT_WARPS,
    MERGE_LANES,
    NOTHING,
    OPTIONS,
    STATISTICS_WARPS,
    VENDOR,
    anchored,
    cap_slope,
    exp,
    lane_sum,
    row_arguments,
    statistics_launch,
    tile_columns,
    transform,
    transform_arguments,
)


@triton.jit
def _load(
    pointer, columns, n_columns, n_loaded, scale, softcap, inv_temperature, HAS_CAP: tl.constexpr, MASKED: tl.constexpr
):
    x = tl.load(pointer + columns, mask=columns < n_loaded).to(tl.float32)
    return transform(x, columns, n_columns, scale, softcap, inv_temperature, HAS_CAP, MASKED)


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
def _steered(a, t, w, MASKED: tl.constexpr):
    """q' = a' + (t' - w'), and -inf where any of the three is."""
    steered = a + (t - w)
    return tl.where(w == float("-inf"), float("-inf"), steered) if MASKED else steered


@triton.jit
def _merge_pair(pointer, stride, s_max, s_sum, t_max, t_sum, s_logit, s_gap, MASKED: tl.constexpr):
    """Statistics [LANES] of s and t, each lane a block centred at its own anchors: merge them and store them."""
    s_top = tl.max(s_max, axis=0)
    t_top = tl.max(t_max, axis=0)
    _, s_shift, s_discount = _rescale(s_max, s_top, MASKED)
    _, t_shift, t_discount = _rescale(t_max, t_top, MASKED)
    tl.store(pointer, s_top)
    tl.store(pointer + stride, tl.sum(s_sum * s_discount, axis=0))
    tl.store(pointer + 2 * stride, t_top)
    tl.store(pointer + 3 * stride, tl.sum(t_sum * t_discount, axis=0))
    tl.store(pointer + 4 * stride, tl.sum(_kept(s_logit, s_sum, s_shift, s_discount, MASKED), axis=0))
    tl.store(pointer + 5 * stride, tl.sum(_kept(s_gap, s_sum, s_shift - t_shift, s_discount, MASKED), axis=0))
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
    tl.store(pointer + 6 * stride, a_top)
    tl.store(pointer + 7 * stride, tl.sum(a_sum * a_discount, axis=0))
    tl.store(pointer + 8 * stride, w_top)
    tl.store(pointer + 9 * stride, tl.sum(w_sum * w_discount, axis=0))
    tl.store(pointer + 10 * stride, q_top)
    tl.store(pointer + 11 * stride, tl.sum(q_sum * q_discount, axis=0))
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
        s = _load(s_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
        t = _load(t_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
        s_max, s, s_shift, s_discount = _centre(s, s_max, MASKED)
        t_max, t, t_shift, t_discount = _centre(t, t_max, MASKED)
        p_s = exp(s)
        p_t = exp(t)
        s_logit = _expect(s_logit, s_sum, s_shift, s_discount, p_s, s, MASKED)
        s_gap = _expect(s_gap, s_sum, s_shift - t_shift, s_discount, p_s, s - t, MASKED)
        if not FOUR:
            t_gap = _expect(t_gap, t_sum, t_shift - s_shift, t_discount, p_t, t - s, MASKED)
        else:
            a = _load(a_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
            w = _load(w_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
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
            q_max, q, _, q_discount = _centre(_steered(a, t, w, MASKED), q_before, MASKED)
            a_sum = a_sum * a_discount + lane_sum(p_a)
            w_sum = w_sum * w_discount + lane_sum(exp(w))
            q_sum = q_sum * q_discount + lane_sum(exp(q))
        s_sum = s_sum * s_discount + lane_sum(p_s)
        t_sum = t_sum * t_discount + lane_sum(p_t)

    out_ptr += tl.program_id(1) * (16 if FOUR else 7) * n_rows + row
    s_shift, s_discount, t_shift, t_discount = _merge_pair(
        out_ptr, n_rows, s_max, s_sum, t_max, t_sum, s_logit, s_gap, MASKED
    )
    if not FOUR:
        t_gap = _kept(t_gap, t_sum, t_shift - s_shift, t_discount, MASKED)
        tl.store(out_ptr + 6 * n_rows, tl.sum(t_gap, axis=0))
    else:
        _merge_text(
            out_ptr, n_rows, s_sum, t_sum, s_shift, s_discount, t_shift, t_discount,
            a_max, a_sum, w_max, w_sum, q_max, q_sum, s_prior_gap, s_view_gap, t_view_gap, a_gap, MASKED,
        )  # fmt: skip


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
    s_logit = tl.load(lanes + 4 * stride, mask=inside, other=0.0)
    s_gap = tl.load(lanes + 5 * stride, mask=inside, other=0.0)
    state_ptr += row
    if not FOUR:
        t_gap = tl.load(lanes + 6 * stride, mask=inside, other=0.0)
    else:
        a_max = tl.load(lanes + 6 * stride, mask=inside, other=float("-inf"))
        a_sum = tl.load(lanes + 7 * stride, mask=inside, other=0.0)
        w_max = tl.load(lanes + 8 * stride, mask=inside, other=float("-inf"))
        w_sum = tl.load(lanes + 9 * stride, mask=inside, other=0.0)
        q_max = tl.load(lanes + 10 * stride, mask=inside, other=float("-inf"))
        q_sum = tl.load(lanes + 11 * stride, mask=inside, other=0.0)
        s_prior_gap = tl.load(lanes + 12 * stride, mask=inside, other=0.0)
        s_view_gap = tl.load(lanes + 13 * stride, mask=inside, other=0.0)
        t_view_gap = tl.load(lanes + 14 * stride, mask=inside, other=0.0)
        a_gap = tl.load(lanes + 15 * stride, mask=inside, other=0.0)
    tl.debug_barrier()  # the state is read before it is written
    s_shift, s_discount, t_shift, t_discount = _merge_pair(
        state_ptr, state_stride, s_max, s_sum, t_max, t_sum, s_logit, s_gap, True
    )
    if not FOUR:
        t_gap = _kept(t_gap, t_sum, t_shift - s_shift, t_discount, True)
        tl.store(state_ptr + 6 * state_stride, tl.sum(t_gap, axis=0))
    else:
        _merge_text(
            state_ptr, state_stride, s_sum, t_sum, s_shift, s_discount, t_shift, t_discount,
            a_max, a_sum, w_max, w_sum, q_max, q_sum, s_prior_gap, s_view_gap, t_view_gap, a_gap, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["state_stride", "n_columns"], do_not_specialize_on_alignment=["state_ptr"])
def gradient_kernel(
    s_ptr, t_ptr, a_ptr, w_ptr, s_stride, t_stride, a_stride, w_stride,
    out_ptr, out_text_ptr, out_stride, out_text_stride,
    state_ptr, state_stride, weight_ptr, mean_gap_ptr, gamma_ptr,
    policy_ptr, chosen_ptr, n_columns, n_loaded,
    student_scale, student_cap, target_scale, target_cap, inv_temperature,
    PRIOR: tl.constexpr, POLICY: tl.constexpr,
    STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # From the last column to the first: what the statistics sweep read last may still be in the cache.
    at = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
    stored = at < n_loaded  # zeros behind the tile's end
    state_ptr += row
    weight = tl.load(weight_ptr + row)
    inv_sum = 1 / tl.load(state_ptr + state_stride)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    s = _load(s_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
    t = _load(t_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
    s_centred = s - anchored(tl.load(state_ptr), MASKED)
    t_centred = t - anchored(tl.load(state_ptr + 2 * state_stride), MASKED)
    exp_s = exp(s_centred)
    a_ptr += row * a_stride
    w_ptr += row * w_stride
    a = _load(a_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
    w = _load(w_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
    a_centred = a - anchored(tl.load(state_ptr + 6 * state_stride), MASKED)
    w_centred = w - anchored(tl.load(state_ptr + 8 * state_stride), MASKED)
    gamma = tl.load(gamma_ptr + row)
    prior_gap = gamma * (a_centred - w_centred)
    if MASKED:  # 0 * inf is 0
        prior_gap = tl.where(gamma > 0, prior_gap, 0.0)
    gap = (1 + gamma) * (s_centred - t_centred) - prior_gap
    p_weight = (weight * inv_sum) * exp_s
    d_s = p_weight * (gap - tl.load(mean_gap_ptr + row))
    if MASKED:
        d_s = tl.where(p_weight != 0, d_s, 0.0)
    if POLICY:
        chosen = (at == tl.load(chosen_ptr + row)) & (at < n_columns)
        pull = tl.load(policy_ptr + row) * (tl.where(chosen, 1.0, 0.0) - inv_sum * exp_s)
        d_s += tl.where(s > float("-inf"), pull, 0.0) if MASKED else pull
    if STUDENT_CAP:
        d_s *= cap_slope(s, student_cap, inv_temperature)
    tl.store(out_ptr + row * out_stride + at, d_s, mask=stored)
    if PRIOR:
        q = _steered(a_centred, t_centred, w_centred, MASKED)
        q -= anchored(tl.load(state_ptr + 10 * state_stride), MASKED)
        prior_weight = weight * gamma
        inv_q_sum = 1 / tl.load(state_ptr + 11 * state_stride)
        d_a = prior_weight * (inv_q_sum * exp(q) - inv_sum * exp_s)
        if MASKED:
            d_a = tl.where(prior_weight != 0, d_a, 0.0)
            d_a = tl.where(a > float("-inf"), d_a, 0.0)
        if STUDENT_CAP:
            d_a *= cap_slope(a, student_cap, inv_temperature)
        tl.store(out_text_ptr + row * out_text_stride + at, d_a, mask=stored)


def _four(rows: list[Tensor]) -> list[Tensor]:
    """A pair has no text rows: its own rows stand in for them and are never read."""
    return rows if len(rows) == 4 else 2 * rows


def statistics(tile: RowTile, state: Tensor) -> None:
    """Fold a tile into the running statistics ``state`` [K, R] (unit stride along R), in place."""
    n_rows = len(tile.student)
    rows = _four(row_arguments(tile))
    n_columns, n_loaded = tile_columns(tile)
    scalars, options = transform_arguments(tile)
    layout, count, blocks = statistics_launch(rows, n_columns, n_loaded)
    parts = state.new_empty(count, len(VGS_STATE if tile.four else PAIR_STATE), n_rows)
    statistics_kernel[(n_rows, count)](
        *rows, *(row.stride(0) for row in rows), parts, n_rows, n_columns, n_loaded, blocks, *scalars,
        FOUR=tile.four, **options, **layout, num_warps=STATISTICS_WARPS[VENDOR], **OPTIONS,
    )  # fmt: skip
    merge_kernel[(n_rows,)](
        state, state.stride(0), parts, n_rows, count,
        FOUR=tile.four, LANES=MERGE_LANES, num_warps=1, **OPTIONS,
    )  # fmt: skip


def gradient(
    tile: RowTile, state: Tensor, coefficients: RowCoefficients, out: Tensor, out_text: Tensor | None = None
) -> None:
    """Of four rows: write d_s to ``out`` [R, C], of a live prior d_a to ``out_text``, maybe the student's tiles.

    Columns behind C that are ``readable`` are overwritten with 0.

    Args:
        state: [K, R] statistics over all columns.
    """
    rows = row_arguments(tile)
    n_columns, n_loaded = tile_columns(tile)
    scalars, options = transform_arguments(tile)
    weight, mean_gap, gamma, prior, *policy = coefficients
    text = out if out_text is None else out_text
    # What a variant does not read is stood in for by what it does.
    vectors = [(weight if value is None else value).contiguous() for value in (weight, mean_gap, gamma, *policy)]
    gradient_kernel[(len(tile.student), triton.cdiv(n_columns, GRADIENT_BLOCK))](
        *rows, *(row.stride(0) for row in rows), out, text, out.stride(0), text.stride(0),
        state, state.stride(0), *vectors, n_columns, n_loaded, *scalars,
        PRIOR=prior, POLICY=coefficients.policy is not None,
        **options, BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS[VENDOR], **OPTIONS,
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
