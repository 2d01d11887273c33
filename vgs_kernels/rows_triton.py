"""The row backend in Triton, for CUDA and ROCm. See rows.py for the notation and rows_torch.py for the same in PyTorch.

Both kernels stream a tile once: the statistics sweep with one program per token, the gradient sweep with one program
per token and column block. In the statistics sweep every thread keeps statistics of its own columns, and they meet
once, behind the last column: nothing waits for other warps on the way. Every load is guarded by the same rule as in
PyTorch: where a softmax weight is 0, the gap that it multiplies does not count, which covers columns masked to -inf and
the columns behind the tile's end alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import RowCoefficients, RowTile

#: Warps by vendor, and columns of a block of gradients: 16-byte loads, and no spills. A block of statistics has as many
#: columns as its threads can load at once: more of them for each thread take registers and save few instructions.
STATISTICS_WARPS = {"cuda": 8, "hip": 4}
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, {"cuda": 8, "hip": 8}
_THREADS = {"cuda": 32, "hip": 64}  # of a warp
_VENDOR = "cuda" if torch.version.hip is None else "hip"


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) cancels near zero; there, the odd series.
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(x2 < 0.0625, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def _load(pointer, columns, valid, scale, softcap, inv_temperature, HAS_CAP: tl.constexpr):
    x = tl.load(pointer + columns, mask=valid, other=float("-inf")).to(tl.float32)
    if HAS_CAP:
        return tl.where(x == float("-inf"), x, _tanh(x * scale / softcap) * softcap * inv_temperature)
    return x * (scale * inv_temperature)


@triton.jit
def _anchor(maximum):
    """What a row is centred at: its maximum, or 0 as long as all columns are masked."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _lane_sum(x):
    """[LANES, WIDTH] -> [LANES]: a thread's own elements."""
    return tl.sum(x, axis=1)


@triton.jit
def _raise(maximum, raised):
    """What a higher maximum means for sums so far: the new anchor, the anchor's shift, the sums' discount."""
    anchor = _anchor(raised)
    return anchor, _anchor(maximum) - anchor, tl.exp(maximum - anchor)


@triton.jit
def _centre(x, maximum):
    """Fold a block into the lanes' maxima: the new ones, the centred block, the anchors' shift, the sums' discount."""
    raised = tl.maximum(maximum, tl.max(x, axis=1))
    anchor, shift, discount = _raise(maximum, raised)
    return raised, x - anchor[:, None], shift, discount


@triton.jit
def _kept(total, sum_before, shift, discount):
    """What remains of a weighted sum of gaps that was centred at the old anchors."""
    return tl.where(discount > 0, (total + shift * sum_before) * discount, 0.0)


@triton.jit
def _expect(total, sum_before, shift, discount, weights, gap):
    """Fold a block into a weighted sum of gaps."""
    return _kept(total, sum_before, shift, discount) + _lane_sum(tl.where(weights > 0, weights * gap, 0.0))


@triton.jit
def _steered(a, t, w):
    """q' = a' + (t' - w'), and -inf where any of the three is."""
    return tl.where(w == float("-inf"), float("-inf"), a + (t - w))


# The number of tokens decides the state's stride and offset: no recompilation for another batch length.
@triton.jit(do_not_specialize=["state_stride"], do_not_specialize_on_alignment=["state_ptr"])
def statistics_kernel(
    s_ptr, t_ptr, a_ptr, w_ptr, s_stride, t_stride, a_stride, w_stride,
    state_ptr, state_stride, n_columns,
    student_scale, student_cap, target_scale, target_cap, inv_temperature,
    FOUR: tl.constexpr, STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    if FOUR:
        a_ptr += row * a_stride
        w_ptr += row * w_stride
    state_ptr += row

    lane = tl.arange(0, LANES)
    offsets = (lane * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]

    # What earlier tiles gave is the first lane's. The order of rows.PAIR_STATE and rows.VGS_STATE.
    first = lane == 0
    s_max = tl.where(first, tl.load(state_ptr), float("-inf"))
    s_sum = tl.where(first, tl.load(state_ptr + state_stride), 0.0)
    t_max = tl.where(first, tl.load(state_ptr + 2 * state_stride), float("-inf"))
    t_sum = tl.where(first, tl.load(state_ptr + 3 * state_stride), 0.0)
    s_logit = tl.where(first, tl.load(state_ptr + 4 * state_stride), 0.0)
    s_gap = tl.where(first, tl.load(state_ptr + 5 * state_stride), 0.0)
    if FOUR:
        a_max = tl.where(first, tl.load(state_ptr + 6 * state_stride), float("-inf"))
        a_sum = tl.where(first, tl.load(state_ptr + 7 * state_stride), 0.0)
        w_max = tl.where(first, tl.load(state_ptr + 8 * state_stride), float("-inf"))
        w_sum = tl.where(first, tl.load(state_ptr + 9 * state_stride), 0.0)
        q_max = tl.where(first, tl.load(state_ptr + 10 * state_stride), float("-inf"))
        q_sum = tl.where(first, tl.load(state_ptr + 11 * state_stride), 0.0)
        s_prior_gap = tl.where(first, tl.load(state_ptr + 12 * state_stride), 0.0)
        s_view_gap = tl.where(first, tl.load(state_ptr + 13 * state_stride), 0.0)
        t_view_gap = tl.where(first, tl.load(state_ptr + 14 * state_stride), 0.0)
        a_gap = tl.where(first, tl.load(state_ptr + 15 * state_stride), 0.0)

    for start in range(0, n_columns, LANES * WIDTH):
        columns = start + offsets
        valid = columns < n_columns
        s = _load(s_ptr, columns, valid, student_scale, student_cap, inv_temperature, STUDENT_CAP)
        t = _load(t_ptr, columns, valid, target_scale, target_cap, inv_temperature, TARGET_CAP)
        s_max, s, s_shift, s_discount = _centre(s, s_max)
        t_max, t, t_shift, t_discount = _centre(t, t_max)
        p_s = tl.exp(s)
        p_t = tl.exp(t)
        s_logit = _expect(s_logit, s_sum, s_shift, s_discount, p_s, s)
        s_gap = _expect(s_gap, s_sum, s_shift - t_shift, s_discount, p_s, s - t)
        if FOUR:
            a = _load(a_ptr, columns, valid, student_scale, student_cap, inv_temperature, STUDENT_CAP)
            w = _load(w_ptr, columns, valid, target_scale, target_cap, inv_temperature, TARGET_CAP)
            a_max, a, a_shift, a_discount = _centre(a, a_max)
            w_max, w, w_shift, w_discount = _centre(w, w_max)
            p_a = tl.exp(a)
            # Outside the support of q*, log q* is -inf.
            prior_gap = tl.where(w == float("-inf"), float("-inf"), a - w)
            s_prior_gap = _expect(s_prior_gap, s_sum, a_shift - w_shift, s_discount, p_s, prior_gap)
            s_view_gap = _expect(s_view_gap, s_sum, s_shift - a_shift, s_discount, p_s, s - a)
            t_view_gap = _expect(t_view_gap, t_sum, t_shift - w_shift, t_discount, p_t, t - w)
            a_gap = _expect(a_gap, a_sum, a_shift - w_shift, a_discount, p_a, a - w)
            q_max, q, _, q_discount = _centre(_steered(a, t, w), q_max + (a_shift + t_shift - w_shift))
            a_sum = a_sum * a_discount + _lane_sum(p_a)
            w_sum = w_sum * w_discount + _lane_sum(tl.exp(w))
            q_sum = q_sum * q_discount + _lane_sum(tl.exp(q))
        s_sum = s_sum * s_discount + _lane_sum(p_s)
        t_sum = t_sum * t_discount + _lane_sum(p_t)

    # The lanes meet: each is a block that was centred at its own anchors.
    s_top = tl.max(s_max, axis=0)
    t_top = tl.max(t_max, axis=0)
    _, s_shift, s_discount = _raise(s_max, s_top)
    _, t_shift, t_discount = _raise(t_max, t_top)
    tl.store(state_ptr, s_top)
    tl.store(state_ptr + state_stride, tl.sum(s_sum * s_discount, axis=0))
    tl.store(state_ptr + 2 * state_stride, t_top)
    tl.store(state_ptr + 3 * state_stride, tl.sum(t_sum * t_discount, axis=0))
    tl.store(state_ptr + 4 * state_stride, tl.sum(_kept(s_logit, s_sum, s_shift, s_discount), axis=0))
    tl.store(state_ptr + 5 * state_stride, tl.sum(_kept(s_gap, s_sum, s_shift - t_shift, s_discount), axis=0))
    if FOUR:
        a_top = tl.max(a_max, axis=0)
        w_top = tl.max(w_max, axis=0)
        _, a_shift, a_discount = _raise(a_max, a_top)
        _, w_shift, w_discount = _raise(w_max, w_top)
        q_max += a_shift + t_shift - w_shift
        q_top = tl.max(q_max, axis=0)
        _, _, q_discount = _raise(q_max, q_top)
        prior_kept = _kept(s_prior_gap, s_sum, a_shift - w_shift, s_discount)
        tl.store(state_ptr + 6 * state_stride, a_top)
        tl.store(state_ptr + 7 * state_stride, tl.sum(a_sum * a_discount, axis=0))
        tl.store(state_ptr + 8 * state_stride, w_top)
        tl.store(state_ptr + 9 * state_stride, tl.sum(w_sum * w_discount, axis=0))
        tl.store(state_ptr + 10 * state_stride, q_top)
        tl.store(state_ptr + 11 * state_stride, tl.sum(q_sum * q_discount, axis=0))
        tl.store(state_ptr + 12 * state_stride, tl.sum(prior_kept, axis=0))
        tl.store(state_ptr + 13 * state_stride, tl.sum(_kept(s_view_gap, s_sum, s_shift - a_shift, s_discount), axis=0))
        tl.store(state_ptr + 14 * state_stride, tl.sum(_kept(t_view_gap, t_sum, t_shift - w_shift, t_discount), axis=0))
        tl.store(state_ptr + 15 * state_stride, tl.sum(_kept(a_gap, a_sum, a_shift - w_shift, a_discount), axis=0))


@triton.jit
def _cap_slope(z, softcap, inv_temperature):
    """Derivative of the soft-cap; the linear gain is already in the token weights."""
    capped = z / (softcap * inv_temperature)
    return 1 - capped * capped


@triton.jit(do_not_specialize=["state_stride"], do_not_specialize_on_alignment=["state_ptr"])
def gradient_kernel(
    s_ptr, t_ptr, a_ptr, w_ptr, s_stride, t_stride, a_stride, w_stride,
    out_ptr, out_text_ptr, out_stride, out_text_stride,
    state_ptr, state_stride, weight_ptr, mean_gap_ptr, gamma_ptr, n_columns,
    student_scale, student_cap, target_scale, target_cap, inv_temperature,
    FOUR: tl.constexpr, PRIOR: tl.constexpr, ADD: tl.constexpr,
    STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = columns < n_columns
    state_ptr += row
    weight = tl.load(weight_ptr + row)
    s = _load(s_ptr + row * s_stride, columns, valid, student_scale, student_cap, inv_temperature, STUDENT_CAP)
    t = _load(t_ptr + row * t_stride, columns, valid, target_scale, target_cap, inv_temperature, TARGET_CAP)
    s_centred = s - _anchor(tl.load(state_ptr))
    t_centred = t - _anchor(tl.load(state_ptr + 2 * state_stride))
    p = tl.exp(s_centred) / tl.load(state_ptr + state_stride)
    gap = s_centred - t_centred
    if FOUR:
        a = _load(a_ptr + row * a_stride, columns, valid, student_scale, student_cap, inv_temperature, STUDENT_CAP)
        w = _load(w_ptr + row * w_stride, columns, valid, target_scale, target_cap, inv_temperature, TARGET_CAP)
        a_centred = a - _anchor(tl.load(state_ptr + 6 * state_stride))
        w_centred = w - _anchor(tl.load(state_ptr + 8 * state_stride))
        gamma = tl.load(gamma_ptr + row)
        gap = (1 + gamma) * gap - tl.where(gamma > 0, gamma * (a_centred - w_centred), 0.0)
    p_weight = weight * p
    d_s = p_weight * (gap - tl.load(mean_gap_ptr + row))
    if STUDENT_CAP:
        d_s *= _cap_slope(s, student_cap, inv_temperature)
    d_s = tl.where(p_weight != 0, d_s, 0.0)  # 0 * inf is 0
    if PRIOR:
        q = _steered(a_centred, t_centred, w_centred) - _anchor(tl.load(state_ptr + 10 * state_stride))
        prior_weight = tl.where(a > float("-inf"), weight * gamma, 0.0)
        d_a = prior_weight * (tl.exp(q) / tl.load(state_ptr + 11 * state_stride) - p)
        if STUDENT_CAP:
            d_a *= _cap_slope(a, student_cap, inv_temperature)
        d_a = tl.where(prior_weight != 0, d_a, 0.0)
        tl.store(out_text_ptr + row * out_text_stride + columns, d_a, mask=valid)
    out_ptr += row * out_stride
    if ADD:
        d_s += tl.load(out_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    tl.store(out_ptr + columns, d_s, mask=valid)


def _row_arguments(tile: RowTile) -> list:
    # A pair has no text rows: its own rows stand in for them and are never read.
    rows = [tile.student, tile.target]
    rows += [tile.student_text, tile.teacher_text] if tile.four else rows
    if any(row.stride(1) != 1 and row.shape[1] > 1 for row in rows):
        raise ValueError("rows must be contiguous along the vocabulary.")
    return [*rows, *(row.stride(0) for row in rows)]


def _transform_arguments(tile: RowTile) -> tuple[list[float], dict[str, bool]]:
    student, target = tile.student_transform, tile.target_transform
    scalars = [student.scale, student.softcap or 1.0, target.scale, target.softcap or 1.0, student.inv_temperature]
    return scalars, {"STUDENT_CAP": student.softcap is not None, "TARGET_CAP": target.softcap is not None}


def statistics_layout(vendor: str, itemsize: int) -> dict[str, int]:
    """How a block's columns are dealt out: 16 bytes to every thread."""
    return {"LANES": STATISTICS_WARPS[vendor] * _THREADS[vendor], "WIDTH": 16 // itemsize}


def statistics(tile: RowTile, state: Tensor) -> None:
    """Fold a tile into the running statistics ``state`` [K, R] (unit stride along R), in place."""
    n_rows, n_columns = tile.student.shape
    scalars, caps = _transform_arguments(tile)
    statistics_kernel[(n_rows,)](
        *_row_arguments(tile), state, state.stride(0), n_columns, *scalars,
        FOUR=tile.four, **caps, **statistics_layout(_VENDOR, tile.student.element_size()),
        num_warps=STATISTICS_WARPS[_VENDOR],
    )  # fmt: skip


def gradient(
    tile: RowTile,
    state: Tensor,
    coefficients: RowCoefficients,
    out: Tensor,
    out_text: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write d_s to ``out`` [R, C], which may be the student's tile itself, and d_a to ``out_text`` if given.

    ``state`` [K, R] are the statistics over all columns; ``add`` adds to what ``out`` holds.
    """
    n_rows, n_columns = tile.student.shape
    scalars, caps = _transform_arguments(tile)
    prior = out_text is not None
    other = out_text if prior else out
    gradient_kernel[(n_rows, triton.cdiv(n_columns, GRADIENT_BLOCK))](
        *_row_arguments(tile), out, other, out.stride(0), other.stride(0),
        state, state.stride(0), *(values.contiguous() for values in coefficients), n_columns, *scalars,
        FOUR=tile.four, PRIOR=prior, ADD=add, **caps, BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS[_VENDOR],
    )  # fmt: skip


def is_interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return bool(triton.knobs.runtime.interpret)


def supports(device: torch.device) -> bool:
    """Whether the kernels can run on tensors of this device."""
    return device.type == "cuda" or is_interpreted()
