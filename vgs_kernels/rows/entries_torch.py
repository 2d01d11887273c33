"""Divergences that are summed entry by entry, in PyTorch: the readable specification of entries_triton.py.

With p = softmax(s), q = softmax(t), r = log(p / q) = (s' - t') - log sum exp s' + log sum exp t' (logits centred at
their row's maximum, see layout.py), an entry of the divergence and p times its derivative by p are::

    reverse_kl   p * r [- p + q]               p * (r + 1)
    forward_kl   -q * r [+ p - q]              -q
    jsd          beta * q * v + (1 - beta) * p * u,  v = log(q / m), u = log(p / m)          (1 - beta) * p * u

What is in brackets sums to 0. It is added where entries are not clipped: then every addend is >= 0 and of second order
in r, so that nothing cancels when the rows are nearly equal; r must be exact then, and so are expm1 and log1p of it.

With slope_j the second column (0 where the entry is clipped) the gradient by s_j is slope_j - p_j * sum_v slope_v.
Where p_j is nearly 1 this is (1 - p_j) * slope_j - p_j * (sum of the other slopes), 1 - p_j the sum of the other p.

Columns outside of a support that keeps a *tail* are one entry together, with p = P and q = Q: the gradient by such an
s_j is p_j / P * slope_tail - p_j * sum_v slope_v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..divergence import Divergence
from .layout import PAIR_STATE, EntryCoefficients, RowTile, Statistics, anchor
from .rows_torch import Blocks, chain, exp, load, one_hot

#: What one sweep over normalised rows sums for each token inside the support: the divergence; slopes and p of the
#: entries with p <= 1/2; the slope of one above, if there is one ...
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
        slope = value + p
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
    """The second of ``entry``, without the first where it is not needed."""
    if divergence.clip is None and divergence.kind in ("forward_kl", "sampled_reverse_kl"):
        return -q  # the gradient of the sampled one is a policy's alone, and this has a weight of 0
    if divergence.clip is None and divergence.kind == "jsd":
        return _student_part(p, r, _log_larger(r, divergence.beta), divergence.beta, masked)
    return entry(p, q, r, divergence, masked=masked)[1]


def _distributions(
    tile: RowTile, rows: slice, columns: slice, state: Tensor, shift: Tensor, blocks: Blocks
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Logits of a block, and p, q and r, [R, C] each, in the blocks' memory."""
    x = {name: values[rows].unsqueeze(1) for name, values in zip(PAIR_STATE, state, strict=True)}
    p, q, r = blocks.temporaries(rows, columns)
    logits = load(tile, rows, columns, state.dtype)
    s = torch.sub(logits["s"], anchor(x["s_max"]), out=p)
    t = torch.sub(logits["t"], anchor(x["t_max"]), out=q)
    torch.sub(s, t, out=r).sub_(shift[rows].unsqueeze(1))
    return logits, [exp(s, out=p).div_(x["s_sum"]), exp(t, out=q).div_(x["t_sum"]), r]


def totals(
    tile: RowTile, state: Tensor, divergence: Divergence, limit: Tensor | None, sums: Tensor, tails: Tensor
) -> None:
    """Add a tile's part to ``SUMS`` [4, R] and, with a limit, to ``TAILS`` [2, R].

    Args:
        state: [K, R] statistics over all columns.
        limit: [R], as in ``EntryCoefficients``.
    """
    blocks = Blocks(tile, state, 3)
    shift = Statistics(state).log_sums.to(state.dtype)
    for rows in blocks.rows():
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
            large = p > 0.5
            of_block = (value, slope.masked_fill(large, 0), p.masked_fill(large, 0), slope.masked_fill_(~large, 0))
            for total, values in zip(sums[:, rows], of_block, strict=True):
                total += values.sum(1)


def gradient(
    tile: RowTile, state: Tensor, divergence: Divergence, coefficients: EntryCoefficients, out: Tensor
) -> None:
    """Write d_s to ``out`` [R, C], which may be the student's tile itself."""
    blocks = Blocks(tile, state, 3)
    shift = Statistics(state).log_sums.to(state.dtype)
    for rows in blocks.rows():
        scalars = [None if value is None else value[rows].unsqueeze(1) for value in coefficients]
        weight, mean_slope, top, tail_slope, tail_log, limit, policy, chosen = scalars
        for columns in blocks.columns():
            logits, (p, q, r) = _distributions(tile, rows, columns, state, shift, blocks)
            slope = _slope(p, q, r, divergence, tile.may_be_masked)
            if limit is not None:
                share = logits["s"] - (tail_log + anchor(state[PAIR_STATE.index("s_max"), rows]).unsqueeze(1))
                outside = tile.student[rows, columns] < limit
                slope = torch.where(outside, exp(share, out=share).mul_(tail_slope), slope)
            d_s = torch.addcmul(slope, p, mean_slope, value=-1, out=r)
            d_s = torch.where(p > 0.75, top, d_s).mul_(weight)
            if tile.may_be_masked:
                d_s.masked_fill_(weight == 0, 0)
            if policy is not None:
                d_s.add_(one_hot(chosen - columns.start, p).sub_(p).mul_(policy))
            out[rows, columns] = chain(d_s, logits["s"], tile)
