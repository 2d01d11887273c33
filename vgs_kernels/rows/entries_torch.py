"""Divergences of a pair of rows, and all gradients, in PyTorch: the readable specification of entries_triton.py.

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
from .layout import LARGE, SATURATED, RowCoefficients, RowTile, anchor, named, wide
from .rows_torch import Blocks, chain, exp, load, one_hot, steered

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
    logits: dict[str, Tensor],
    x: dict[str, Tensor],
    temporaries: list[Tensor],
    wanted: str = "qr",
    mean: Tensor | float = 0.0,
) -> list[Tensor]:
    """p, q and r - mean of a block, [R, C] each, in this memory; q and r are void unless ``wanted``."""
    p, q, r = temporaries
    s = torch.sub(logits["s"], anchor(x["s_max"]), out=p)
    t = torch.sub(logits["t"], anchor(x["t_max"]), out=q)
    if "r" in wanted:
        shift = wide(x["s_sum"]).log() - wide(x["t_sum"]).log() + mean
        torch.sub(s, t, out=r).sub_(shift.to(r.dtype))
    if "q" in wanted:
        exp(t, out=q).div_(x["t_sum"])
    return [exp(s, out=p).div_(x["s_sum"]), q, r]


def totals(
    tile: RowTile, state: Tensor, divergence: Divergence, limit: Tensor | None, sums: Tensor, tails: Tensor
) -> None:
    """Add a tile's part to ``SUMS`` [4, R] and, with a limit, to ``TAILS`` [2, R].

    Args:
        state: [K, R] statistics over all columns.
        limit: [R], as in ``RowCoefficients``.
    """
    blocks = Blocks(tile, state, 3)
    for rows in blocks.rows():
        x = named(state[:, rows].unsqueeze(2))
        has_large = bool((1 / x["s_sum"] > LARGE).any())
        for columns in blocks.columns():
            logits = load(tile, rows, columns, state.dtype)
            p, q, r = _distributions(logits, x, blocks.temporaries(rows, columns))
            value, slope = entry(p, q, r, divergence, masked=tile.may_be_masked)
            if limit is not None:
                inside = tile.student[rows, columns] >= limit[rows].unsqueeze(1)
                value, slope, p = (x.masked_fill_(~inside, 0) for x in (value, slope, p))
                for name, tail in zip("st", tails[:, rows], strict=True):
                    outside = logits[name].masked_fill(inside, -torch.inf) - anchor(x[f"{name}_max"])
                    torch.logaddexp(tail, outside.logsumexp(1), out=tail)
            of_block = [value, slope, p]
            if has_large:
                large = p > LARGE
                top = slope.masked_fill(~large, 0)
                of_block = [value, slope.masked_fill_(large, 0), p.masked_fill_(large, 0), top]
            for total, values in zip(sums[:, rows], of_block, strict=False):
                total += values.sum(1)


def gradient(
    tile: RowTile,
    state: Tensor,
    divergence: Divergence | None,
    coefficients: RowCoefficients,
    out: Tensor,
    out_text: Tensor | None = None,
) -> None:
    """Write d_s to ``out`` [R, C], of a live prior d_a to ``out_text``; they may be the student's tiles themselves.

    Args:
        state: [K, R] statistics over all columns.
        divergence: of a pair; None of four rows.
    """
    masked = tile.may_be_masked
    blocks = Blocks(tile, state, 6 if tile.four else 3)
    for rows in blocks.rows():
        x = named(state[:, rows].unsqueeze(2))
        here = RowCoefficients(*(y[..., rows].unsqueeze(-1) if isinstance(y, Tensor) else y for y in coefficients))
        x["mean"], x["top"] = here.centre(state[:, rows].unsqueeze(2))
        for columns in blocks.columns():
            logits, temporaries = load(tile, rows, columns, state.dtype), blocks.temporaries(rows, columns)
            if tile.four:
                p, d_s, d_a = _of_four(logits, x, here, temporaries, masked)
                if d_a is not None:
                    out_text[rows, columns] = chain(d_a, logits["a"], tile)
            else:
                student = tile.student[rows, columns]
                p, d_s = _of_pair(logits, x, divergence, here, temporaries, masked, student)
            d_s.mul_(here.weight)
            if masked:
                d_s.masked_fill_(here.weight == 0, 0)
            if here.policy is not None:
                d_s.add_(one_hot(here.chosen - columns.start, p).sub_(p).mul_(here.policy))
            out[rows, columns] = chain(d_s, logits["s"], tile)


def _of_four(
    logits: dict[str, Tensor], x: dict[str, Tensor], here: RowCoefficients, temporaries: list[Tensor], masked: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """p, d_s before its weight, and d_a of a live prior."""
    p, *temporaries = temporaries
    centred = {
        name: torch.sub(values, anchor(x[f"{name}_max"]), out=temporary)
        for (name, values), temporary in zip(logits.items(), temporaries, strict=False)
    }
    exp(centred["s"], out=p).div_(x["s_sum"])
    d_a = None
    if here.live_prior:
        q = steered(centred, masked, out=temporaries[-1]).sub_(anchor(x["q_max"]))
        weight = here.weight * here.gamma
        d_a = _unless_zero(exp(q, out=q).div_(x["q_sum"]).sub_(p).mul_(weight), weight, masked)
    prior_gap = _unless_zero(centred["a"].sub_(centred["w"]), here.gamma, masked)
    gap = centred["s"].sub_(centred["t"]).mul_(1 + here.gamma)
    gap.addcmul_(prior_gap, here.gamma, value=-1).sub_(x["mean"])
    return p, _unless_zero(gap.mul_(p), p, masked), d_a


def _of_pair(
    logits: dict[str, Tensor],
    x: dict[str, Tensor],
    divergence: Divergence,
    here: RowCoefficients,
    temporaries: list[Tensor],
    masked: bool,
    student: Tensor,
) -> tuple[Tensor, Tensor]:
    """p, and d_s before its weight; ``student`` are its logits as they lie in the tile."""
    wanted = "qr" if divergence.clip is not None else "r" if divergence.kind in ("reverse_kl", "jsd") else "q"
    # Of a plain reverse KL, p * r - p * mean is p * (r - mean).
    plain = divergence.kind == "reverse_kl" and divergence.clip is None and here.limit is None
    p, q, r = _distributions(logits, x, temporaries, wanted, x["mean"] if plain else 0.0)
    slope = _slope(p, q, r, divergence, masked)
    if here.limit is not None:
        share = logits["s"] - (here.tail_log + anchor(x["s_max"]))
        outside = student < here.limit
        slope = torch.where(outside, exp(share, out=share).mul_(here.tail_slope), slope)
    d_s = slope if plain else torch.addcmul(slope, p, x["mean"], value=-1, out=q)
    return p, torch.where(p > SATURATED, x["top"], d_s) if (1 / x["s_sum"] > SATURATED).any() else d_s
