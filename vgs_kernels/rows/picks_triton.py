"""What a gradient knows of single columns and of whole tokens, in Triton; picks_torch.py is the same in PyTorch.

It is little work, of which PyTorch makes dozens of launches for each tile. Scalars are computed in float64, as there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..divergence import Divergence
from .layout import RowTile
from .picks_torch import PolicySlopes
from .triton_common import OPTIONS, TileArguments, transform

#: Tokens and warps of a program.
LAYOUT, WARPS = {"BLOCK": 128}, 4


@triton.jit(
    do_not_specialize=["s_stride", "t_stride", "out_stride", "start", "n_rows", "n_columns"],
    do_not_specialize_on_alignment=["s_ptr", "t_ptr", "id_ptr", "out_ptr"],
)
def pick_kernel(
    s_ptr, t_ptr, s_stride, t_stride, id_ptr, out_ptr, out_stride, start, n_rows, n_columns,
    student_scale, student_cap, target_scale, target_cap, inv_temperature,
    BOTH: tl.constexpr, STUDENT_CAP: tl.constexpr, TARGET_CAP: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits of a block of tokens, one column each."""
    row = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    column = tl.load(id_ptr + row, mask=row < n_rows, other=-1) - start
    inside = (column >= 0) & (column < n_columns)
    s = tl.load(s_ptr + row * s_stride + column, mask=inside, other=0.0).to(tl.float32)
    s = transform(s, column, n_columns, student_scale, student_cap, inv_temperature, STUDENT_CAP, MASKED)
    tl.store(out_ptr + row, s, mask=inside)
    if BOTH:
        t = tl.load(t_ptr + row * t_stride + column, mask=inside, other=0.0).to(tl.float32)
        t = transform(t, column, n_columns, target_scale, target_cap, inv_temperature, TARGET_CAP, MASKED)
        tl.store(out_ptr + out_stride + row, t, mask=inside)


def pick(tile: RowTile, ids: Tensor, start: int, out: Tensor) -> None:
    """``picks_torch.pick``, in one launch; all of unit stride along the tokens."""
    x, n_rows = TileArguments.of(tile, four=False), len(ids)
    pick_kernel[(triton.cdiv(n_rows, LAYOUT["BLOCK"]),)](
        *x.rows[:2], *x.strides[:2], ids, out, out.stride(0), start, n_rows, x.n_columns, *x.scalars,
        BOTH=len(out) == 2, **x.options, **LAYOUT, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip


@triton.jit
def _wide(pointer, inside):
    return tl.load(pointer, mask=inside, other=1.0).to(tl.float64)


@triton.jit
def _log_probability(logit_ptr, state_ptr, state_stride, inside):
    """Of a row whose maximum and sum lie there."""
    centred = _wide(logit_ptr, inside) - _wide(state_ptr, inside)
    return centred - tl.log(_wide(state_ptr + state_stride, inside))


_VECTORS = ("state", "picked", "weight", "summed", "slope", "old", "least", "most", "out")


@triton.jit(
    do_not_specialize=["state_stride", "picked_stride", "n_rows"],
    do_not_specialize_on_alignment=[f"{name}_ptr" for name in _VECTORS],
)
def token_scalars_kernel(
    state_ptr, state_stride, picked_ptr, picked_stride, weight_ptr, summed_ptr,
    slope_ptr, old_ptr, least_ptr, most_ptr, out_ptr, n_rows, limit,
    SAMPLED: tl.constexpr, CLIP: tl.constexpr, POLICY: tl.constexpr, COMPARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights and pulls of a block of tokens, out [2, R]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    state_ptr += row
    picked_ptr += row
    weight = _wide(weight_ptr + row, inside)
    pull = tl.zeros([BLOCK], tl.float64)
    if SAMPLED or COMPARES:
        log_p = _log_probability(picked_ptr, state_ptr, state_stride, inside)
    if SAMPLED or CLIP:
        if SAMPLED:
            t_state_ptr = state_ptr + 2 * state_stride
            value = log_p - _log_probability(picked_ptr + picked_stride, t_state_ptr, state_stride, inside)
        else:
            value = _wide(summed_ptr + row, inside)
        value = tl.where(_wide(state_ptr + state_stride, inside) == 0, float("inf"), value)
        above = value > limit
        if SAMPLED:
            if CLIP:
                value = tl.where(above, limit, tl.where(value < -limit, -limit, value))
            pull = tl.where(weight == 0, 0.0, weight * value)
            weight = tl.zeros([BLOCK], tl.float64)
        else:
            weight = tl.where(above, 0.0, weight)
    if POLICY:
        slope = _wide(slope_ptr + row, inside)
        if COMPARES:
            ratio = tl.exp(log_p - _wide(old_ptr + row, inside))
            counts = (ratio >= _wide(least_ptr + row, inside)) & (ratio <= _wide(most_ptr + row, inside))
            slope = tl.where(counts, slope * ratio, 0.0)
        pull += slope
    tl.store(out_ptr + row, weight.to(tl.float32), mask=inside)
    tl.store(out_ptr + n_rows + row, pull.to(tl.float32), mask=inside)


def token_scalars(
    state: Tensor,
    picked: Tensor | None,
    weight: Tensor,
    summed: Tensor | None,
    divergence: Divergence | None,
    policy: PolicySlopes | None,
) -> tuple[Tensor, Tensor | None]:
    """``picks_torch.token_scalars``, in one launch or, where there is nothing to compute, in none."""
    sampled = divergence is not None and divergence.sampled
    limit = None if divergence is None else divergence.token_clip
    slopes = policy or PolicySlopes(weight)
    if not sampled and limit is None and slopes.old is None:
        return weight, None if policy is None else slopes.slopes
    # What a variant does not read is stood in for by what it does.
    vectors = [weight if x is None else x for x in (summed, *slopes)]
    picks, out = state if picked is None else picked, state.new_empty(2, state.shape[1])
    token_scalars_kernel[(triton.cdiv(state.shape[1], LAYOUT["BLOCK"]),)](
        state, state.stride(0), picks, picks.stride(0), weight, *vectors, out, state.shape[1],
        0.0 if limit is None else float(limit),
        SAMPLED=sampled, CLIP=limit is not None, POLICY=policy is not None, COMPARES=slopes.old is not None,
        **LAYOUT, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return out[0], None if policy is None and not sampled else out[1]
