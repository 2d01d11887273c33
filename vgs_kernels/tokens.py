"""What a call says of its tokens: weights, sampled ids, which of them take part, and how their losses are reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .policy import PolicyTerm
from .rows.layout import accumulation_dtype


class Tokens:
    """The arguments of the tokens of one call, checked and flattened.

    Args:
        name, like: the argument [..., D] whose leading dimensions are the tokens.
        token_weights, target_ids, ignore_index, reduction, policy: as the public functions take them.

    Attributes:
        fixed: tensors of the operator.
        numbers: numbers of the operator.
        ignored, counted: [N] bool, tokens that are ignored, and those that take part; None: none, and all.
        names: of the optional terms.
    """

    def __init__(
        self,
        name: str,
        like: Tensor,
        token_weights: Tensor | None,
        target_ids: Tensor | None,
        ignore_index: int,
        reduction: str | None,
        policy: PolicyTerm | None,
    ) -> None:
        checks.tensor(name, like, None)
        self.like, self.shape, self.dtype = like, like.shape[:-1], accumulation_dtype(like)
        checks.choice("reduction", reduction, (None, "mean", "sum", "none"))
        checks.integer("ignore_index", ignore_index)
        self.unreduced, self._reduction = reduction == "none", reduction
        ids = checks.per_token("target_ids", target_ids, like, [torch.int64])
        self.names = [] if ids is None else ["target_logps"]
        self.ignored = None if ids is None else ids == ignore_index
        if self.ignored is not None and checks.readable(ids) and not self.ignored.any():
            self.ignored = None
        self.fixed = {"ids": ids, **self._weights(checks.per_token("token_weights", token_weights, like))}
        self.numbers = {"ignore_index": None if ids is None else ignore_index}
        if policy is not None:
            self._add_policy(policy)

    def _weights(self, weights: Tensor | None) -> dict[str, Tensor]:
        """Weights [N] in the precision of sums, and which tokens take part."""
        n, averages = self.shape.numel(), self._reduction == "mean" or (self._reduction is None and weights is None)
        self.counted = None
        if weights is None and self.ignored is None:
            value = 1.0 / max(n, 1) if averages else 1.0
            return {"token_weights": torch.full((n,), value, dtype=self.dtype, device=self.like.device)}
        weights = torch.ones(n, device=self.like.device) if weights is None else weights
        weights = self._unless_ignored(weights.to(self.dtype))
        self.counted = weights != 0
        if averages:
            total = weights.sum()
            weights = weights / torch.where(total == 0, 1, total)
        return {"token_weights": weights, "counted": self.counted}

    def _unless_ignored(self, values: Tensor) -> Tensor:
        return values if self.ignored is None else values.masked_fill(self.ignored, 0)

    def _add_policy(self, policy: PolicyTerm) -> None:
        checks.instance("policy", policy, PolicyTerm, optional=True)
        if self.fixed["ids"] is None:
            raise ValueError("target_ids must be given with a policy, got None.")
        if self.unreduced:
            raise ValueError("policy must be None for reduction='none': it is no part of the tokens' losses.")
        for name in ("advantages", "weights"):
            checks.instance(f"policy.{name}", getattr(policy, name), Tensor)
        for name in ("epsilon_low", "epsilon_high"):
            self.numbers[name] = checks.number(f"policy.{name}", getattr(policy, name), ">= 0")
        names = ("advantages", "weights", "old_logps")
        vectors = {name: checks.per_token(f"policy.{name}", getattr(policy, name), self.like) for name in names}
        vectors["policy_weights"] = self._unless_ignored(vectors.pop("weights"))
        self.fixed |= vectors
        self.names.append("policy")

    def scale(self, factor: float) -> None:
        """Multiply the weights."""
        self.fixed["token_weights"] = self.fixed["token_weights"] * factor

    def shaped(self, values: Tensor) -> Tensor:
        """Results [N] in the tokens' shape, 0 where they are ignored."""
        return self._unless_ignored(values).reshape(self.shape)
