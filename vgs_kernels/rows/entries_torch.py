"""Divergences that are summed entry by entry, in PyTorch: the readable specification of entries_triton.py.

With p = softmax(s), q = softmax(t), r = log(p / q) = (s' - t') - log sum exp s' + log sum exp t' (logits centred at
their row's maximum, see layout.py), an entry of the divergence and p times its derivative by p are::

    reverse_kl   p * r [- p + q]               p * r [+ p]
    forward_kl   -q * r [+ p - q]              -q
    jsd          beta * q * v + (1 - beta) * p * u,  v = log(q / m), u = log(p / m)          (1 - beta) * p * u

The first bracket sums to 0. It is added where entries are not clipped: then every addend is >= 0 and of second order in
r, so that nothing cancels when the rows are nearly equal; r must be exact then, and so are expm1 and log1p of it. The
second one is of the gradient of clipped entries; without a clip any multiple of p does not change it.

With slope_j the second column (0 where the entry is clipped) the gradient by s_j is slope_j - p_j * sum_v slope_v.
Where p_j is nearly 1 this is (1 - p_j) * slope_j - p_j * (sum of the other slopes), 1 - p_j the sum of the other p.

Columns outside of a support that keeps a *tail* are one entry together, with p = P and q = Q: the gradient by such an
s_j is p_j / P * slope_tail - p_j * sum_v slope_v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergence import Divergence
from .layout import LARGE, PAIR_STATE, SATURATED, EntryCoefficients, RowTile, Statistics, anchor
from .rows_torch import Blocks, chain, exp, load, one_hot

#: What one sweep over normalised rows sums for each token inside the support: the divergence; slopes and p of the
#: entries with p <= ``LARGE``; the slope of one above, if there is one ...
SUMS = ("value", "slope", "rest", "top_slope")
#: ... and log sum exp s' and t' of the columns outside: a tail may weigh less than the least float32.
TAILS = ("s_tail", "t_tail")


def entry(p: Tensor, q: Tensor, r: Tensor, divergence: Divergence, *, masked: bool = True) -> tuple[Tensor, Tensor]:
    """An entry and p times its derivative, of tensors of one shape; p = 0 or q = 0 contribute nothing.

    Only where a column can be ``masked`` is r infinite there; else 0 * r is 0 by itself.
    """
    balanced = divergence.clip is None
    if divergence.kind == "reverse_kl":
        value = _unless_zero(p * r, p, masked)
        slope = value if balanced else value + p
        if balanced:
            value = _balanced(value - p + q, p, -r)
    elif divergence.kind == "forward_kl":
        value, slope = _unless_zero(q * r, q, masked).neg_(), -q
        if balanced:
            value = _balanced(value + p - q, q, r)
    else:
        larger = _log_larger(r, divergence.beta)
        slope = _student_part(p, r, larger, divergence.beta, masked)
        teacher_part = torch.clamp(r, min=0).add_(larger).mul_(q)
        value = _unless_zero(teacher_part, q, masked).mul_(-divergence.beta).add_(slope)
    if divergence.clip is not None:
        slope.masked_fill_(value > divergence.clip, 0)
        value.clamp_(max=divergence.clip)
    return value, slope


def _balanced(plain: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """y * (e^x - 1 - x), which is ``plain`` where x is not small."""
    return torch.where(x.abs() < 0.1, y * (torch.expm1(x) - x), plain)


def _log_larger(r: Tensor, beta: float) -> Tensor:
    """log(m / max(p, q)) of r = log(p / q), m = beta * q + (1 - beta) * p; beside the larger, nothing overflows."""
    share = beta if beta == 0.5 else (r < 0).to(r.dtype).mul_(1 - 2 * beta).add_(beta)
    return torch.abs(r).neg_().expm1_().mul_(share).log1p_()


def _student_part(p: Tensor, r: Tensor, larger: Tensor, beta: float, masked: bool) -> Tensor:
    """(1 - beta) * p * log(p / m)."""
    return _unless_zero(torch.clamp(r, max=0).sub_(larger).mul_(p), p, masked).mul_(1 - beta)


def _unless_zero(product: Tensor, factor: Tensor, masked: bool) -> Tensor:
    """In place: 0 * inf is 0."""
    return product.masked_fill_(factor == 0, 0) if masked else product


def _slope(p: Tensor, q: Tensor, r: Tensor, divergence: Divergence, masked: bool) -> Tensor:
    """The second of ``entry``, without the first where it is not needed; may overwrite r."""
    if divergence.clip is not None:
        return entry(p, q, r, divergence, masked=masked)[1]
    if divergence.kind == "reverse_kl":
        return _unless_zero(r.mul_(p), p, masked)
    if divergence.kind == "jsd":
        return _student_part(p, r, _log_larger(r, divergence.beta), divergence.beta, masked)
    return -q  # the gradient of the sampled one is a policy's alone, and this has a weight of 0


def _distributions(
    tile: RowTile, rows: slice, columns: slice, state: Tensor, shift: Tensor, blocks: Blocks, wanted: str = "qr"
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Logits of a block, and p, q and r, [R, C] each, in the blocks' memory; q and r are void unless ``wanted``."""
    x = {name: values[rows].unsqueeze(1) for name, values in zip(PAIR_STATE, state, strict=True)}
    p, q, r = blocks.temporaries(rows, columns)
    logits = load(tile, rows, columns, state.dtype)
    s = torch.sub(logits["s"], anchor(x["s_max"]), out=p)
    t = torch.sub(logits["t"], anchor(x["t_max"]), out=q)
    if "r" in wanted:
        torch.sub(s, t, out=r).sub_(shift[rows].unsqueeze(1))
    if "q" in wanted:
        exp(t, out=q).div_(x["t_sum"])
    return logits, [exp(s, out=p).div_(x["s_sum"]), q, r]


def _has_p_above(least: float, state: Tensor) -> bool:
    """Whether a token's largest p is above this."""
    return bool((1 / state[PAIR_STATE.index("s_sum")] > least).any())


def totals(
    tile: RowTile,
    state: Tensor,
    divergence: Divergence,
    limit: Tensor | None,
    sums: Tensor,
    tails: Tensor,
    needed: Tensor | None = None,
) -> None:
    """Add a tile's part to ``SUMS`` [4, R] and, with a limit, to ``TAILS`` [2, R].

    Args:
        state: [K, R] statistics over all columns.
        limit: [R], as in ``EntryCoefficients``.
        needed: [R] bool, the tokens whose sums are wanted, without a limit; None: all.
    """
    if needed is not None and not needed.all():
        at = needed.nonzero().squeeze(1)
        if len(at):
            part = sums[:, at]
            totals(tile.pair_at(at), state[:, at], divergence, None, part, tails)
            sums[:, at] = part
        return
    blocks = Blocks(tile, state, 3)
    shift = Statistics(state).log_sums.to(state.dtype)
    for rows in blocks.rows():
        has_large = _has_p_above(LARGE, state[:, rows])
        for columns in blocks.columns():
            logits, (p, q, r) = _distributions(tile, rows, columns, state, shift, blocks)
            value, slope = entry(p, q, r, divergence, masked=tile.may_be_masked)
            if limit is not None:
                inside = tile.student[rows, columns] >= limit[rows].unsqueeze(1)
                value, slope, p = (x.masked_fill_(~inside, 0) for x in (value, slope, p))
                for name, tail in zip("st", tails[:, rows], strict=True):
                    top = anchor(state[PAIR_STATE.index(f"{name}_max"), rows])
                    found = logits[name].masked_fill(inside, -torch.inf).logsumexp(1).sub_(top)
                    torch.logaddexp(tail, found, out=tail)
            of_block = [value, slope, p]
            if has_large:
                large = p > LARGE
                top = slope.masked_fill(~large, 0)
                of_block = [value, slope.masked_fill_(large, 0), p.masked_fill_(large, 0), top]
            for total, values in zip(sums[:, rows], of_block, strict=False):
                total += values.sum(1)


def gradient(
    tile: RowTile, state: Tensor, divergence: Divergence, coefficients: EntryCoefficients, out: Tensor
) -> None:
    """Write d_s to ``out`` [R, C], which may be the student's tile itself."""
    blocks = Blocks(tile, state, 3)
    shift = Statistics(state).log_sums.to(state.dtype)
    of_kind = {"reverse_kl": "r", "jsd": "r"}.get(divergence.kind, "q")
    wanted = of_kind if divergence.clip is None else "qr"
    # Of a plain reverse KL, p * r - p * mean_slope is p * (r - mean_slope).
    plain = divergence.kind == "reverse_kl" and divergence.clip is None and coefficients.limit is None
    if plain:
        shift = shift + coefficients.mean_slope
    for rows in blocks.rows():
        scalars = [None if value is None else value[rows].unsqueeze(1) for value in coefficients]
        weight, mean_slope, top, tail_slope, tail_log, limit, policy, chosen = scalars
        saturated = _has_p_above(SATURATED, state[:, rows])
        for columns in blocks.columns():
            logits, (p, q, r) = _distributions(tile, rows, columns, state, shift, blocks, wanted)
            slope = _slope(p, q, r, divergence, tile.may_be_masked)
            if limit is not None:
                share = logits["s"] - (tail_log + anchor(state[PAIR_STATE.index("s_max"), rows]).unsqueeze(1))
                outside = tile.student[rows, columns] < limit
                slope = torch.where(outside, exp(share, out=share).mul_(tail_slope), slope)
            d_s = slope if plain else torch.addcmul(slope, p, mean_slope, value=-1, out=q)
            d_s = (torch.where(p > SATURATED, top, d_s) if saturated else d_s).mul_(weight)
            if tile.may_be_masked:
                d_s.masked_fill_(weight == 0, 0)
            if policy is not None:
                d_s.add_(one_hot(chosen - columns.start, p).sub_(p).mul_(policy))
            out[rows, columns] = chain(d_s, logits["s"], tile)
