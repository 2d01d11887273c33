"""What a call says of its tokens: weights, sampled ids, which of them take part, and how their losses are reduced."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks
from .policy import PolicyTerm
from .rows.layout import accumulation_dtype

REDUCTIONS = (None, "mean", "sum", "none")


class Tokens:
    """The arguments of the tokens of one call, checked and flattened.

    Args:
        like: [..., D], whose leading dimensions are those of everything here.
        token_weights, target_ids, ignore_index, reduction, policy: as the public functions take them.
        vocab: entries of the vocabulary, or None where only the ranks together know.

    Attributes:
        fixed: tensors of the operator.
        numbers: numbers of the operator.
        counted: [N] bool, tokens that take part; None: all.
        reduction: of the operator.
    """

    def __init__(
        self,
        like: Tensor,
        token_weights: Tensor | None,
        target_ids: Tensor | None,
        ignore_index: int,
        reduction: str | None,
        policy: PolicyTerm | None,
        vocab: int | None,
    ) -> None:
        self._like, self._shape = like, like.shape[:-1]
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of mean, sum, none, or None, got {reduction!r}.")
        self.reduction = "none" if reduction == "none" else "sum"
        ids = self.flat("target_ids", target_ids, integer=True)
        self._ignored = None if ids is None else ids == checks.index("ignore_index", ignore_index)
        checks.ids_in_vocabulary("target_ids", ids, self._ignored, vocab)
        if self._ignored is not None and checks.readable(self._ignored) and not self._ignored.any():
            self._ignored = None
        weights = self.flat("token_weights", token_weights)
        self.fixed: dict[str, Tensor | None] = {"ids": ids, **self._weights(weights, reduction)}
        self.numbers: dict[str, float | None] = {"ignore_index": None if ids is None else ignore_index}
        if policy is not None:
            self._add_policy(policy)

    def _weights(self, weights: Tensor | None, reduction: str | None) -> dict[str, Tensor | None]:
        """Weights [N] in the precision of sums, and which tokens take part."""
        dtype, like = accumulation_dtype(self._like), self._like
        n = self._shape.numel()
        averages = reduction == "mean" or (reduction is None and weights is None)
        self.counted = None
        if weights is None and self._ignored is None:
            value = 1.0 / max(n, 1) if averages else 1.0
            return {"token_weights": torch.full((n,), value, dtype=dtype, device=like.device)}
        weights = torch.ones(n, dtype=dtype, device=like.device) if weights is None else weights.to(dtype)
        weights = self._unless_ignored(weights)
        self.counted = weights != 0
        if averages:
            total = weights.sum()
            weights = weights / torch.where(total == 0, 1, total)
        return {"token_weights": weights, "counted": self.counted}

    def _unless_ignored(self, values: Tensor) -> Tensor:
        return values if self._ignored is None else values.masked_fill(self._ignored, 0)

    def _add_policy(self, policy: PolicyTerm) -> None:
        if not isinstance(policy, PolicyTerm):
            raise TypeError(f"policy must be a PolicyTerm or None, got {type(policy).__name__}.")
        if self.fixed["ids"] is None:
            raise ValueError("target_ids must be given with a policy, got None.")
        if self.reduction == "none":
            raise ValueError("policy must be None for reduction='none': it is no part of the tokens' losses.")
        names = ("advantages", "weights", "old_logps")
        vectors = {name: self.flat(f"policy.{name}", getattr(policy, name)) for name in names}
        for name in ("advantages", "weights"):
            if vectors[name] is None:
                raise TypeError(f"policy.{name} must be a torch.Tensor, got NoneType.")
        for name in ("epsilon_low", "epsilon_high"):
            self.numbers[name] = checks.number(f"policy.{name}", getattr(policy, name))
            if self.numbers[name] < 0:
                raise ValueError(f"policy.{name} must be >= 0, got {self.numbers[name]}.")
        vectors["policy_weights"] = self._unless_ignored(vectors.pop("weights"))
        self.fixed |= vectors

    def flat(self, name: str, value: Tensor | None, *, integer: bool = False) -> Tensor | None:
        """Check an optional argument with one entry for each token, and flatten it."""
        return checks.per_token(name, value, self._like, integer=integer)

    @property
    def terms(self) -> list[str]:
        """Names of the optional terms."""
        names = [] if self.fixed["ids"] is None else ["target_logps"]
        return [*names, "policy"] if "advantages" in self.fixed else names

    @property
    def counted_shaped(self) -> Tensor | None:
        """``counted`` in the tokens' shape."""
        return None if self.counted is None else self.counted.reshape(self._shape)

    def scale(self, factor: float) -> None:
        """Multiply the weights."""
        self.fixed["token_weights"] = self.fixed["token_weights"] * factor

    def shaped(self, values: Tensor) -> Tensor:
        """Results [N] in the tokens' shape, 0 where they are ignored."""
        return self._unless_ignored(values).reshape(self._shape)

    def reduced(self, loss: Tensor) -> Tensor:
        """The loss as it is returned."""
        return loss.reshape(self._shape) if self.reduction == "none" else loss
