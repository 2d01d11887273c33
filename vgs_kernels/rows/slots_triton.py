"""A guess, tile by tile, which tokens will pass the gate, without the host: their text-only gradients are formed while
the rows are in memory. gated_rows.py keeps what is guessed; steering.py puts right what was wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .layout import slices
from .triton_common import OPTIONS

#: Tokens of a launch, those that are counted at a time, scores that a quantile is taken of; warps.
LAYOUT, WARPS = {"ROWS": 256, "CHUNK": 32, "SAMPLES": 4096}, 8
#: Floats that are not negative are ordered as their bits are; of these the lowest ones do not matter here.
_INFINITY, _HIGHEST_BIT, _LEAST_BIT = tl.constexpr(0x7F800000), tl.constexpr(1 << 30), tl.constexpr(1 << 7)


@triton.jit
def _quantile(score_ptr, count, quantile, SAMPLES: tl.constexpr):
    """Bits of the score below which that share of the first ``count`` lies, a little rounded up: of at most SAMPLES of
    them, evenly spread. Found bit by bit."""
    sample = tl.arange(0, SAMPLES)
    at = (sample * tl.maximum(count / SAMPLES, 1.0)).to(tl.int32)
    seen = tl.load(score_ptr + at, mask=at < count, other=float("nan")).to(tl.int32, bitcast=True)
    there = (seen >= 0) & (seen <= _INFINITY)
    position = tl.floor(quantile * (tl.sum(there.to(tl.int32), axis=0) - 1)).to(tl.int32)
    found, step = position * 0, position * 0 + _HIGHEST_BIT
    while step >= _LEAST_BIT:
        below = tl.sum((there & (seen < found + step)).to(tl.int32), axis=0)
        found = tl.where(below <= position, found + step, found)
        step = step // 2
    return found + (_LEAST_BIT - 1)


@triton.jit(
    do_not_specialize=["state_stride", "start", "n_rows", "n_slots", "quantile", "first"],
    do_not_specialize_on_alignment=["state_ptr", "limit_ptr", "counted_ptr", "slot_ptr"],
)
def slots_kernel(
    state_ptr, state_stride, score_ptr, limit_ptr, counted_ptr, slot_ptr, token_ptr, used_ptr, formed_ptr,
    start, n_rows, n_slots, quantile, first,
    KNOWN: tl.constexpr, LIMITED: tl.constexpr, COUNTED: tl.constexpr, EXACT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """One program; of [N] vectors the tokens from ``start`` on, of [R] vectors the first ``n_rows``."""
    row = tl.arange(0, ROWS)
    token = start + row
    inside = row < n_rows
    state_ptr += row
    a_sum = tl.load(state_ptr + 5 * state_stride, mask=inside, other=1.0)
    w_sum = tl.load(state_ptr + 7 * state_stride, mask=inside, other=1.0)
    a_gap = tl.load(state_ptr + 15 * state_stride, mask=inside, other=0.0)
    counted = inside
    if COUNTED:
        counted &= tl.load(counted_ptr + token, mask=inside, other=0) != 0
    if KNOWN:
        score = tl.load(score_ptr + token, mask=inside, other=0.0)
    else:
        t_sum = tl.load(state_ptr + 3 * state_stride, mask=inside, other=1.0)
        t_gap = tl.load(state_ptr + 14 * state_stride, mask=inside, other=0.0)
        score = tl.maximum(t_gap / t_sum + tl.log(w_sum / t_sum), 0.0)
        score = tl.where(counted, score, float("nan"))
        tl.store(score_ptr + token, score, mask=inside)
    if LIMITED:
        passes = score > tl.load(limit_ptr + token, mask=inside, other=0.0)
    else:
        tl.debug_barrier()  # these scores are read by all threads
        passes = score.to(tl.int32, bitcast=True) > _quantile(score_ptr, start + n_rows, quantile, SAMPLES)
    passes &= counted
    if not EXACT:  # a gradient that is not finite could not be taken back
        infinity = float("inf")
        passes &= (score > -infinity) & (tl.abs(a_gap) < infinity)
        passes &= (a_sum > 0) & (a_sum < infinity) & (w_sum > 0) & (w_sum < infinity)
    used = tl.load(used_ptr)
    if first:  # of its block of gradients
        used = used * 0
        for begin in range(0, n_slots, CHUNK):
            at = begin + tl.arange(0, CHUNK)
            tl.store(token_ptr + at, at.to(tl.int64) * 0 - 1, mask=at < n_slots)
    tl.store(formed_ptr + token, passes.to(tl.int32), mask=inside)
    tl.debug_barrier()
    place = tl.zeros([ROWS], tl.int32) + used
    for begin in range(0, n_rows, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        other = tl.load(formed_ptr + start + at, mask=at < n_rows, other=0) != 0
        place += tl.sum(((at[None, :] < row[:, None]) & other[None, :]).to(tl.int32), axis=1)
    fits = passes & (place < n_slots)
    tl.store(slot_ptr + row, tl.where(fits, place, -1), mask=inside)
    tl.store(token_ptr + place, token.to(tl.int64), mask=fits)
    tl.debug_barrier()  # everything was read
    tl.store(formed_ptr + token, fits.to(tl.int32), mask=inside)
    tl.store(used_ptr, used + tl.sum(fits.to(tl.int32), axis=0))


def assign(
    state: Tensor,
    rows: slice,
    scores: Tensor,
    limits: Tensor | None,
    counted: Tensor | None,
    quantile: float,
    slots: Tensor,
    tokens: Tensor,
    used: Tensor,
    formed: Tensor,
    *,
    known: bool,
    exact: bool,
    first: bool,
) -> None:
    """Give slots to the tokens that pass the gate as far as one can know, until none is left.

    Args:
        state: [K, R] statistics of four rows.
        rows: which tokens these are.
        scores: [N] float32 visual dependency scores, ``known``; or to be written, NaN for tokens that do not count.
        limits: [N] of the scores; None: the ``quantile`` of the tokens so far.
        counted: [N] bool, or None for all.
        quantile: see ``limits``.
        slots: [R] int32, written: a token's slot, or -1.
        tokens: [S] int64, written: a slot's token, or -1.
        used: [1] int32, read and written: how many slots are taken.
        formed: [N] int32, written: 1 for tokens that have got one.
        known: see ``scores``.
        exact: whether scores and limits are those of the call; else what is not finite gets no slot.
        first: whether a block of gradients begins, whose slots are all free.
    """
    for part in slices(len(slots), LAYOUT["ROWS"]):
        here = state[:, part]
        slots_kernel[(1,)](
            here, here.stride(0), scores, scores if limits is None else limits, formed if counted is None else counted,
            slots[part], tokens, used, formed, rows.start + part.start, part.stop - part.start, len(tokens),
            float(quantile), int(first and part.start == 0),
            KNOWN=known, LIMITED=limits is not None, COUNTED=counted is not None, EXACT=exact,
            **LAYOUT, num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
