"""What a gradient knows of single columns and of whole tokens, in PyTorch: the specification of picks_triton.py.

A sampled column's log-probability is (logit - max) - log sum exp, from its logit, once transformed, and the statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..divergence import Divergence
from .layout import RowTile, Statistics, scaled, wide


class PolicySlopes(NamedTuple):
    """A policy gradient by the log-probabilities of R tokens, [R] each: slopes * ratio where least <= ratio <= most.

    ratio = exp(log p - old). Without ``old`` the ratio is 1, and counts.
    """

    slopes: Tensor
    old: Tensor | None = None
    least: Tensor | None = None
    most: Tensor | None = None

    def at(self, rows: slice) -> PolicySlopes:
        """Those of some tokens."""
        return PolicySlopes(*(None if x is None else x[rows] for x in self))


def pick(tile: RowTile, ids: Tensor, start: int, out: Tensor) -> None:
    """Copy the logits, once transformed, at the columns ``ids`` that lie in a tile to ``out``; others stay.

    Args:
        ids: [R] int64, any.
        start: the tile's first column.
        out: [1, R] of the student's row, or [2, R] of the target's too.
    """
    local = ids - start if start else ids
    place = local.clamp(0, tile.student.shape[1] - 1)
    for values, (logits, transform) in zip(out, tile.pair, strict=False):
        chosen = logits.gather(1, place.unsqueeze(1)).squeeze(1)
        torch.where(place == local, transform(chosen.to(out.dtype)), values, out=values)


def token_values(state: Tensor, picked: Tensor | None, summed: Tensor, divergence: Divergence) -> Tensor:
    """Values of tokens [R] before a clip of theirs: those ``summed`` over all entries, or at the sampled column."""
    x, value = Statistics(state), wide(summed)
    if divergence.sampled:
        value = x.log_probability(picked[0]) - x.log_probability(picked[1], "t")
    # A student without any mass inside the support, as of distributions that do not meet.
    return value.masked_fill(x["s_sum"] == 0, torch.inf)


def clipped(values: Tensor, divergence: Divergence) -> Tensor:
    """The same after it; a log-ratio is clipped at both ends."""
    limit = divergence.token_clip
    return values if limit is None else values.clamp(min=-limit if divergence.sampled else None, max=limit)


def token_scalars(
    state: Tensor,
    picked: Tensor | None,
    weight: Tensor,
    summed: Tensor | None,
    divergence: Divergence | None,
    policy: PolicySlopes | None,
) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``policy`` of ``RowCoefficients``, [R] each.

    Args:
        state: [K, R] statistics over all columns.
        picked: [1 or 2, R] logits of the sampled columns, see ``pick``; None where nothing needs them.
        weight: [R] of the divergence's gradient.
        summed: [R] values of the divergence, unless it is the sampled one.
        divergence: None of four rows.
        policy: of these tokens, or None.
    """
    pull = None
    if divergence is not None and divergence.sampled:
        pull = scaled(weight, clipped(token_values(state, picked, summed, divergence), divergence))
        weight = torch.zeros_like(weight)
    elif divergence is not None and divergence.token_clip is not None:
        weight = torch.where(token_values(state, picked, summed, divergence) > divergence.token_clip, 0, weight)
    if policy is not None:
        slope = policy.slopes
        if policy.old is not None:
            ratio = (Statistics(state).log_probability(picked[0]) - policy.old).exp()
            slope = torch.where((ratio >= policy.least) & (ratio <= policy.most), slope * ratio, 0)
        pull = slope if pull is None else pull + slope
    return weight, None if pull is None else pull.to(state.dtype)
