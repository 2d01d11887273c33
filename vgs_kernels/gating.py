"""From visual dependency scores to the gate and to the adaptive gamma (arXiv 2606.00564, Eq. 12, 16, 24-25)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .objective import VGSObjective
from .parallel import gather_rows
from .rows.layout import has_float64


def grouped_quantile(values: Tensor, quantile: float, groups: Tensor | None = None) -> Tensor:
    """Linear-interpolated quantile (as ``torch.quantile``) of each token's group, without a host synchronisation.

    Args:
        values: [N] scores.
        quantile: in [0, 1].
        groups: [N] int64 group of each token; None puts all tokens in one group.

    Returns:
        [N] tensor: the quantile of the group that the token belongs to.
    """
    if groups is None:  # then the host knows how many there are
        ordered, position = values.sort().values, quantile * (len(values) - 1)
        low, high, fraction = ordered[int(position)], ordered[math.ceil(position)], position % 1
        return (torch.lerp(low, high, fraction) if fraction > 0 else low).expand_as(values)
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(groups[order], stable=True)]
    ordered, keys = values[order], groups[order].contiguous()
    first = torch.searchsorted(keys, groups.contiguous())
    count = torch.searchsorted(keys, groups.contiguous(), right=True) - first
    # float32 would move the quantile of groups beyond 2^24 tokens.
    position = quantile * (count - 1).to(torch.float64 if has_float64(values.device) else torch.float32)
    below = position.floor()
    fraction = (position - below).to(values.dtype)
    low = ordered[first + below.long()]
    high = ordered[first + position.ceil().long()]
    # The guard keeps an infinite score of the next token out of a quantile that it does not touch.
    return torch.where(fraction > 0, torch.lerp(low, high, fraction), low)


def thresholds(
    vds: Tensor,
    objective: VGSObjective,
    trajectory_ids: Tensor | None = None,
    group_name: str | None = None,
    counted: Tensor | None = None,
) -> list[Tensor]:
    """The VDS quantiles of ``objective.quantiles`` in the objective's scope, one [N] tensor each.

    Args:
        vds: [N] visual dependency scores of this rank's tokens.
        objective: gives the quantiles and the scope.
        trajectory_ids: [N] int64, needed for the scope ``"trajectory"``.
        group_name: process group of the scope ``"ranks"``; every rank must call, also one without tokens.
        counted: [N] bool, the tokens that the quantiles are of; the limits of others mean nothing. None means all.
    """
    if objective.vds_scope == "call" and counted is None:
        return [grouped_quantile(vds, q) if len(vds) else vds for q in objective.quantiles]
    groups = trajectory_ids if objective.vds_scope == "trajectory" else torch.zeros_like(vds, dtype=torch.int64)
    if counted is not None:  # a group of their own behind all others
        groups = groups.masked_fill(~counted, torch.iinfo(torch.int64).max)
    if objective.vds_scope == "trajectory":
        return [grouped_quantile(vds, q, groups) for q in objective.quantiles]
    pool = vds
    if objective.vds_scope == "ranks":
        pool, groups = (gather_rows(x, group_name) for x in (vds, groups))
    if vds.numel() == 0:
        return [vds for _ in objective.quantiles]
    first = groups.argmin().reshape(1)  # an index without dimensions would be read by the host
    return [grouped_quantile(pool, q, groups).index_select(0, first).expand_as(vds) for q in objective.quantiles]


def token_gamma(vds: Tensor, objective: VGSObjective, limits: list[Tensor]) -> Tensor:
    """gamma of every token, [N]: constant, or stepping up at the two limits (Eq. 24-25)."""
    if objective.schedule == "constant":
        return torch.full_like(vds, objective.gamma)
    low, high = limits
    return 0.5 * objective.gamma * ((vds > low).to(vds.dtype) + (vds > high).to(vds.dtype))


def max_gated(n_tokens: int, objective: VGSObjective) -> int:
    """Upper bound on the tokens of one call strictly above its own quantile: known before any score is."""
    return max(0, n_tokens - 1 - math.floor(objective.vds_quantile * (n_tokens - 1)))
