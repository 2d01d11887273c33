"""Divergences of a pair of rows, and all gradients, in Triton; entries_torch.py has the mathematics, in PyTorch.

In a gradient sweep a program takes one token and one column block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..divergence import Divergence
from .entries_torch import SUMS, TAILS
from .entry_triton import KINDS, REVERSE, entry
from .layout import LARGE, SATURATED, RowCoefficients, RowTile
from .triton_common import (
    GRADIENT_BLOCK,
    GRADIENT_WARPS,
    MERGE_LANES,
    NOTHING,
    OPTIONS,
    STATISTICS_WARPS,
    VENDOR,
    TileArguments,
    anchored,
    cap_slope,
    exp,
    lane_sum,
    load,
    log,
    statistics_launch,
    steered,
    transform,
)

_LARGE, _SATURATED = tl.constexpr(LARGE), tl.constexpr(SATURATED)


@triton.jit
def _raw(pointer, columns, n_loaded):
    return tl.load(pointer + columns, mask=columns < n_loaded).to(tl.float32)


@triton.jit
def _distributions(
    s, t, at, n_columns, state_ptr, state_stride,
    student_scale, student_cap, target_scale, target_cap, inv_temperature,
    STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """p, q, s', t' and the student's logits, of logits as they lie in the tile."""
    s = transform(s, at, n_columns, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
    t = transform(t, at, n_columns, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
    s_centred = s - anchored(tl.load(state_ptr), MASKED)
    t_centred = t - anchored(tl.load(state_ptr + 2 * state_stride), MASKED)
    p = exp(s_centred) * (1 / tl.load(state_ptr + state_stride))
    q = exp(t_centred) * (1 / tl.load(state_ptr + 3 * state_stride))
    return p, q, s_centred, t_centred, s


@triton.jit
def _log_ratio(state_ptr, state_stride):
    """log sum exp s' - log sum exp t': what makes s' - t' the log-ratio of the two probabilities."""
    return log(tl.load(state_ptr + state_stride) / tl.load(state_ptr + 3 * state_stride))


@triton.jit
def _of_statistics(state_ptr, state_stride, above, KIND: tl.constexpr, GAP: tl.constexpr):
    """A KL, what its gradient is centred at, and whether both are exact: neither too small nor of a certain student."""
    s_sum = tl.load(state_ptr + state_stride)
    t_sum = tl.load(state_ptr + 3 * state_stride)
    log_ratio = tl.log(tl.div_rn(s_sum, t_sum))
    if KIND == REVERSE:
        value = tl.div_rn(tl.load(state_ptr + GAP * state_stride), s_sum) - log_ratio
        mean = value
    else:
        value = tl.div_rn(tl.load(state_ptr + (GAP + 1) * state_stride), t_sum) + log_ratio
        mean = value * 0 - 1
    return value, mean, (s_sum >= 1 / _LARGE) & (value >= above)


@triton.jit
def _tail(maximum, total, x, outside):
    """Fold columns outside of a support into a lane's maximum and sum of exponentials. Without any, its sum is void."""
    x = tl.maximum(tl.where(outside, x, NOTHING), NOTHING)
    higher = tl.maximum(maximum, tl.max(x, axis=1))
    return higher, total * exp(maximum - higher) + lane_sum(exp(x - higher[:, None]))


@triton.jit
def _log_sum(maximum, total):
    """log sum exp of all lanes."""
    top = tl.max(maximum, axis=0)
    whole = tl.sum(total * exp(maximum - top), axis=0)
    return tl.where(top > NOTHING, top + tl.log(whole), float("-inf"))


@triton.jit(
    do_not_specialize=["state_stride", "n_rows", "n_columns", "n_blocks"],
    do_not_specialize_on_alignment=["state_ptr", "slot_ptr"],
)
def totals_kernel(
    s_ptr, t_ptr, s_stride, t_stride, state_ptr, state_stride, limit_ptr, slot_ptr,
    out_ptr, n_rows, n_columns, n_loaded, n_blocks,
    student_scale, student_cap, target_scale, target_cap, inv_temperature, beta, clip, above,
    KIND: tl.constexpr, CLIP: tl.constexpr, TAIL: tl.constexpr, SKIP: tl.constexpr, SLOTS: tl.constexpr,
    STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, MASKED: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """``SUMS`` and ``TAILS`` of ``n_blocks`` blocks of a token's columns, out [splits, 6, R]."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    state_ptr += row
    shift = _log_ratio(state_ptr, state_stride)
    begin = tl.program_id(1) * (n_blocks * LANES * WIDTH)
    end = tl.minimum(begin + n_blocks * LANES * WIDTH, n_columns)
    if SKIP:
        of_statistics, mean, skipped = _of_statistics(state_ptr, state_stride, above, KIND, 11 if SLOTS else 5)
        end = tl.where(skipped, begin, end)
        if SLOTS:
            end = tl.where(tl.load(slot_ptr + row) < 0, begin, end)
        skipped &= tl.program_id(1) == 0  # the first split speaks for all
    lane = tl.arange(0, LANES)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    offsets = lane + column * LANES if INTERLEAVED else lane * WIDTH + column
    zero = tl.zeros([LANES], tl.float32)
    values, slopes, rests, tops = zero, zero, zero, zero
    if TAIL:
        s_max, s_tail, t_max, t_tail = zero + NOTHING, zero, zero + NOTHING, zero
    for start in range(begin, end, LANES * WIDTH):
        at = start + offsets
        raw = _raw(s_ptr, at, n_loaded)
        p, q, s, t, _ = _distributions(
            raw, _raw(t_ptr, at, n_loaded), at, n_columns, state_ptr, state_stride,
            student_scale, student_cap, target_scale, target_cap, inv_temperature, STUDENT_CAP, TARGET_CAP, MASKED,
        )  # fmt: skip
        value, slope = entry(p, q, s - t - shift, beta, clip, KIND, CLIP, MASKED)
        counted = at < n_columns
        if TAIL:
            limit = tl.load(limit_ptr + row)
            outside = counted & (raw < limit)
            s_max, s_tail = _tail(s_max, s_tail, s, outside)
            t_max, t_tail = _tail(t_max, t_tail, t, outside)
            counted &= raw >= limit
        if MASKED or TAIL:
            value = tl.where(counted, value, 0.0)
            slope = tl.where(counted, slope, 0.0)
            p = tl.where(counted, p, 0.0)
        large = p > _LARGE
        values += lane_sum(value)
        slopes += lane_sum(tl.where(large, 0.0, slope))
        rests += lane_sum(tl.where(large, 0.0, p))
        tops += lane_sum(tl.where(large, slope, 0.0))
    out_ptr += tl.program_id(1) * 6 * n_rows + row
    value = tl.sum(values, axis=0)
    top = tl.sum(tops, axis=0)
    if SKIP:
        value = tl.where(skipped, of_statistics, value)
        top = tl.where(skipped, mean, top)
    tl.store(out_ptr, value)
    tl.store(out_ptr + n_rows, tl.sum(slopes, axis=0))
    tl.store(out_ptr + 2 * n_rows, tl.sum(rests, axis=0))
    tl.store(out_ptr + 3 * n_rows, top)
    if TAIL:
        tl.store(out_ptr + 4 * n_rows, _log_sum(s_max, s_tail))
        tl.store(out_ptr + 5 * n_rows, _log_sum(t_max, t_tail))


@triton.jit
def _centred(p, slope, slopes, rest, top):
    """The gradient of a pair by its logits, of weight 1, from ``SUMS``."""
    return tl.where(p > _SATURATED, rest * top - (1 - rest) * slopes, slope - p * (slopes + top))


@triton.jit
def _of_text(d_a, weight, a, cap, inv_temperature, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """A gradient by a' as one by the text-only logits a in the tile."""
    if MASKED:
        d_a = tl.where(weight != 0, d_a, 0.0)
        d_a = tl.where(a > float("-inf"), d_a, 0.0)
    if HAS_CAP:
        d_a *= cap_slope(a, cap, inv_temperature)
    return d_a


@triton.jit
def _joined(pointer, stride, n_splits, LANES: tl.constexpr):
    """A sum, of what the splits of a row have of it."""
    split = tl.arange(0, LANES)
    return tl.sum(tl.load(pointer + split * stride, mask=split < n_splits, other=0.0), axis=0)


_VECTORS = (
    *("weight", "gamma", "sums", "policy", "chosen", "tail_slope", "tail_log", "limit"),
    *("slot", "text_weight", "text_sums"),
)


@triton.jit(
    do_not_specialize=["state_stride", "sums_stride", "split_stride", "n_splits", "n_columns"],
    do_not_specialize_on_alignment=["state_ptr", *(f"{name}_ptr" for name in _VECTORS)],
)
def gradient_kernel(
    s_ptr, t_ptr, a_ptr, w_ptr, s_stride, t_stride, a_stride, w_stride,
    out_ptr, out_text_ptr, out_stride, out_text_stride, state_ptr, state_stride, sums_stride, split_stride, n_splits,
    weight_ptr, gamma_ptr, sums_ptr, policy_ptr, chosen_ptr, tail_slope_ptr, tail_log_ptr, limit_ptr,
    slot_ptr, text_weight_ptr, text_sums_ptr,
    n_columns, n_loaded,
    student_scale, student_cap, target_scale, target_cap, inv_temperature, beta, clip,
    FOUR: tl.constexpr, PRIOR: tl.constexpr, POLICY: tl.constexpr, SLOTS: tl.constexpr,
    KIND: tl.constexpr, CLIP: tl.constexpr, TAIL: tl.constexpr,
    STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # From the last column to the first: what the statistics sweep read last may still be in the cache.
    at = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK + tl.arange(0, BLOCK)
    stored = at < n_loaded  # zeros behind the tile's end
    state_ptr += row
    weight = tl.load(weight_ptr + row)
    raw = _raw(s_ptr + row * s_stride, at, n_loaded)
    p, q, s_centred, t_centred, s = _distributions(
        raw, _raw(t_ptr + row * t_stride, at, n_loaded), at, n_columns, state_ptr, state_stride,
        student_scale, student_cap, target_scale, target_cap, inv_temperature, STUDENT_CAP, TARGET_CAP, MASKED,
    )  # fmt: skip
    if FOUR:
        a_ptr += row * a_stride
        w_ptr += row * w_stride
        a = load(a_ptr, at, n_columns, n_loaded, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
        w = load(w_ptr, at, n_columns, n_loaded, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
        a_centred = a - anchored(tl.load(state_ptr + 4 * state_stride), MASKED)
        w_centred = w - anchored(tl.load(state_ptr + 6 * state_stride), MASKED)
        gamma = tl.load(gamma_ptr + row)
        prior_gap = gamma * (a_centred - w_centred)
        prior_mean = gamma * tl.load(state_ptr + 12 * state_stride)
        if MASKED:  # 0 * inf is 0
            prior_gap = tl.where(gamma > 0, prior_gap, 0.0)
            prior_mean = tl.where(gamma > 0, prior_mean, 0.0)
        mean = (1 + gamma) * tl.load(state_ptr + 11 * state_stride) - prior_mean
        mean /= tl.load(state_ptr + state_stride)
        d_s = weight * p * ((1 + gamma) * (s_centred - t_centred) - prior_gap - mean)
        if MASKED:
            d_s = tl.where(p > 0, d_s, 0.0)
    else:
        log_ratio = s_centred - t_centred - _log_ratio(state_ptr, state_stride)
        _, slope = entry(p, q, log_ratio, beta, clip, KIND, CLIP, MASKED)
        if TAIL:
            share = exp(s_centred - tl.load(tail_log_ptr + row))
            slope = tl.where(raw >= tl.load(limit_ptr + row), slope, share * tl.load(tail_slope_ptr + row))
        sums_ptr += row
        slopes = tl.load(sums_ptr + sums_stride)
        rest = tl.load(sums_ptr + 2 * sums_stride)
        d_s = weight * _centred(p, slope, slopes, rest, tl.load(sums_ptr + 3 * sums_stride))
    if MASKED:
        d_s = tl.where(weight != 0, d_s, 0.0)
    if POLICY:
        chosen = at == tl.load(chosen_ptr + row)
        d_s += tl.load(policy_ptr + row) * (tl.where(chosen, 1.0, 0.0) - p)
    if STUDENT_CAP:
        d_s *= cap_slope(s, student_cap, inv_temperature)
    if MASKED:
        d_s = tl.where(s > float("-inf"), d_s, 0.0)
    tl.store(out_ptr + row * out_stride + at, tl.where(at < n_columns, d_s, 0.0), mask=stored)
    if PRIOR:
        q = steered(a_centred, t_centred, w_centred, MASKED)
        q -= anchored(tl.load(state_ptr + 8 * state_stride), MASKED)
        prior_weight = weight * gamma
        d_a = prior_weight * (exp(q) * (1 / tl.load(state_ptr + 9 * state_stride)) - p)
        d_a = _of_text(d_a, prior_weight, a, student_cap, inv_temperature, STUDENT_CAP, MASKED)
        tl.store(out_text_ptr + row * out_text_stride + at, d_a, mask=stored)
    if SLOTS:
        slot = tl.load(slot_ptr + row).to(tl.int64)
        if slot >= 0:
            text_weight = tl.load(text_weight_ptr + row)
            p_a = exp(a_centred) * (1 / tl.load(state_ptr + 5 * state_stride))
            log_ratio = a_centred - w_centred - _log_ratio(state_ptr + 4 * state_stride, state_stride)
            _, slope = entry(p_a, p_a, log_ratio, beta, clip, REVERSE, False, MASKED)
            text_sums_ptr += row
            slopes = _joined(text_sums_ptr + sums_stride, split_stride, n_splits, SPLITS)
            rest = _joined(text_sums_ptr + 2 * sums_stride, split_stride, n_splits, SPLITS)
            top = _joined(text_sums_ptr + 3 * sums_stride, split_stride, n_splits, SPLITS)
            d_a = text_weight * _centred(p_a, slope, slopes, rest, top)
            d_a = _of_text(d_a, text_weight, a, student_cap, inv_temperature, STUDENT_CAP, MASKED)
            tl.store(out_text_ptr + slot * out_text_stride + at, tl.where(at < n_columns, d_a, 0.0), mask=stored)


def _options(divergence: Divergence | None, limit: Tensor | None) -> tuple[list[float], dict[str, object]]:
    divergence = divergence or Divergence()  # of four rows none is read
    clip = 0.0 if divergence.clip is None else float(divergence.clip)
    kind = "even_jsd" if divergence.kind == "jsd" and divergence.beta == 0.5 else divergence.kind
    options = {"KIND": KINDS[kind], "CLIP": divergence.clip is not None, "TAIL": limit is not None}
    return [float(divergence.beta), clip], options


def _strides(sums: Tensor | None, parts: Tensor | None) -> tuple[int, int, int]:
    """From one of ``SUMS`` to the next, from a split to the next, and how many splits there are; of the one of both
    that a call has."""
    if parts is None:
        return 0 if sums is None else sums.stride(0), 0, 1
    return parts.stride(1), parts.stride(0), len(parts)


def _totals(
    tile: RowTile,
    state: Tensor,
    divergence: Divergence,
    limit: Tensor | None,
    above: float | None,
    slots: Tensor | None = None,
) -> Tensor:
    """``SUMS`` and ``TAILS`` of the splits of the rows, [splits, 6, R]."""
    x, n_rows = TileArguments.of(tile, four=False), len(tile.student)
    scalars, options = _options(divergence, limit)
    layout, count, blocks = statistics_launch(x)
    parts = state.new_empty(count, len(SUMS) + len(TAILS), n_rows)
    totals_kernel[(n_rows, count)](
        *x.rows, *x.strides, state, state.stride(0), state if limit is None else limit,
        x.rows[0] if slots is None else slots, parts, n_rows, x.n_columns, x.n_loaded, blocks, *x.scalars, *scalars,
        0.0 if above is None else above, SKIP=above is not None, SLOTS=slots is not None,
        **x.options, **options, **layout, num_warps=STATISTICS_WARPS[VENDOR], **OPTIONS,
    )  # fmt: skip
    return parts


def totals(
    tile: RowTile,
    state: Tensor,
    divergence: Divergence,
    limit: Tensor | None,
    sums: Tensor,
    tails: Tensor | None,
    above: float | None = None,
) -> None:
    """Add a tile's part to ``SUMS`` and, with a limit, to ``TAILS``; arguments as in entries_torch.totals.

    Of a KL ``above`` is that of ``Backend``; the tile then spans the vocabulary, and nothing was added before.
    """
    parts = _totals(tile, state, divergence, limit, above)
    if above is None:
        sums.add_(parts[:, : len(SUMS)].sum(0))
    else:
        torch.sum(parts[:, : len(SUMS)], 0, out=sums)
    if limit is not None:
        torch.logaddexp(tails, parts[:, len(SUMS) :].logsumexp(0), out=tails)


def text_totals(tile: RowTile, state: Tensor, slots: Tensor) -> Tensor:
    """``text_sums`` of ``RowCoefficients``: of KL(softmax(a) || softmax(w)), of the tokens whose slot [R] is not
    negative; of others they are void.

    Args:
        tile: four rows that span the vocabulary. state: [K, R] their statistics. slots: int32.
    """
    return _totals(tile.text_pair, state[4:], Divergence(), None, -torch.inf, slots)


def gradient(
    tile: RowTile,
    state: Tensor,
    divergence: Divergence | None,
    coefficients: RowCoefficients,
    out: Tensor,
    out_text: Tensor | None = None,
) -> None:
    """Write d_s to ``out`` [R, C], of a live prior d_a to ``out_text``; arguments as in entries_torch.gradient.

    Columns behind C that are ``readable`` are overwritten with 0. Of tokens with a slot, ``out_text`` [S, C] takes the
    gradient of the language term.
    """
    x = TileArguments.of(tile)
    scalars, options = _options(divergence, coefficients.limit)
    text, sums, parts = out if out_text is None else out_text, coefficients.sums, coefficients.text_sums
    # What a variant does not read is stood in for by what it does.
    vectors = [coefficients.weight if y is None else y for y in (getattr(coefficients, name) for name in _VECTORS)]
    gradient_kernel[(len(tile.student), triton.cdiv(x.n_columns, GRADIENT_BLOCK))](
        *x.rows, *x.strides, out, text, out.stride(0), text.stride(0), state, state.stride(0),
        *_strides(sums, parts), *vectors,
        x.n_columns, x.n_loaded, *x.scalars, *scalars,
        FOUR=tile.four, PRIOR=coefficients.live_prior, POLICY=coefficients.policy is not None,
        SLOTS=coefficients.slot is not None, **x.options, **options,
        BLOCK=GRADIENT_BLOCK, SPLITS=MERGE_LANES, num_warps=GRADIENT_WARPS[VENDOR], **OPTIONS,
    )  # fmt: skip
