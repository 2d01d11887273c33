"""Divergences that are summed entry by entry, from normalised rows: what the two entry backends share.

With p = softmax(s), q = softmax(t), r = log(p / q) = (s' - t') - log sum exp s' + log sum exp t' (logits centred at
their row's maximum, see rows.py), an entry of the divergence and p times its derivative by p are::

    reverse_kl   p * r                         p * (r + 1)
    forward_kl   -q * r                        -q
    jsd          beta * q * v + (1 - beta) * p * u,  v = log(q / m), u = log(p / m)          (1 - beta) * p * u

With slope_j the second column (0 where the entry is clipped) the gradient by s_j is slope_j - p_j * sum_v slope_v.
Nearly equal rows have a small r, and u and v must be as exact as it is: they come from expm1 and log1p of it.

Columns outside of a support that keeps a *tail* are one entry together, with p = P and q = Q: the gradient by such an
s_j is p_j * (slope_tail / P - sum_v slope_v).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .divergence import Divergence
from .rows import Statistics

#: What one sweep over normalised rows sums for each token: divergence and slopes of the entries inside the support ...
SUMS = ("value", "slope")
#: ... and log sum exp s' and t' of the columns outside: a tail may weigh less than the least float32.
TAILS = ("s_tail", "t_tail")


class EntryCoefficients(NamedTuple):
    """Per-token scalars of the gradient, [R] each: d_s = weight * (slope - p * mean_slope), and outside of the support
    weight * p * (tail_slope - mean_slope); plus the policy's part as in ``rows.RowCoefficients``.

    ``limit`` is the least logit of the student, as it lies in the tile, that is inside the support; None: all are.
    """

    weight: Tensor
    mean_slope: Tensor
    tail_slope: Tensor | None
    limit: Tensor | None
    policy: Tensor | None = None
    chosen: Tensor | None = None


def log_sums(state: Tensor) -> Tensor:
    """log sum exp s' - log sum exp t', [R], in the state's precision."""
    x = Statistics(state)
    return (x["s_sum"].log() - x["t_sum"].log()).to(state.dtype)


def entry(p: Tensor, q: Tensor, r: Tensor, divergence: Divergence, *, masked: bool = True) -> tuple[Tensor, Tensor]:
    """An entry and p times its derivative, of tensors of one shape; p = 0 or q = 0 contribute nothing.

    Only where a column can be ``masked`` is r infinite there; else 0 * r is 0 by itself.
    """
    if divergence.kind == "reverse_kl":
        value = _unless_zero(p * r, p, masked)
        slope = value + p
    elif divergence.kind == "forward_kl":
        value, slope = _unless_zero(q * r, q, masked).neg_(), -q
    else:
        larger = _log_larger(r, divergence.beta)
        slope = _student_part(p, r, larger, divergence.beta, masked)
        teacher_part = torch.clamp(r, min=0).add_(larger).mul_(q)
        value = _unless_zero(teacher_part, q, masked).mul_(-divergence.beta).add_(slope)
    if divergence.clip is not None:
        slope.masked_fill_(value > divergence.clip, 0)
        value.clamp_(max=divergence.clip)
    return value, slope


def entry_slope(p: Tensor, q: Tensor, r: Tensor, divergence: Divergence, *, masked: bool) -> Tensor:
    """The second of ``entry``, without the first where it is not needed."""
    if divergence.kind != "jsd" or divergence.clip is not None:
        return entry(p, q, r, divergence, masked=masked)[1]
    return _student_part(p, r, _log_larger(r, divergence.beta), divergence.beta, masked)


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
