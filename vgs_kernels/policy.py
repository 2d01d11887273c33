"""A clipped policy gradient on the sampled tokens, added to a divergence: both come from the same sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .rows.layout import scaled, wide
from .rows.picks_torch import PolicySlopes


class PolicyTerm(NamedTuple):
    """sum_n weights_n * -min(ratio_n * A_n, clamp(ratio_n, 1 - epsilon_low, 1 + epsilon_high) * A_n).

    ratio = exp(log p(target_ids) - old_logps), p the student at the loss's temperature (PPO, arXiv 1707.06347, Eq. 7;
    GRPO without its KL term). ``eta`` and the token weights of the divergence do not multiply it.

    Attributes:
        advantages: [N].
        weights: [N], e.g. (1 - alpha) / (responses * tokens of the response).
        old_logps: [N] log-probabilities of the policy that sampled; None: those of this very call, a ratio of 1.
        epsilon_low, epsilon_high: >= 0.

    Gradients of 16-bit logits are scaled for ratios up to some thousands.
    """

    advantages: Tensor
    weights: Tensor
    old_logps: Tensor | None = None
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2


class PolicyGradient:
    """The [N]-vector arithmetic of a policy term within one call.

    Attributes:
        slopes: of the gradient, once prepared.
    """

    def __init__(
        self,
        advantages: Tensor,
        weights: Tensor,
        old_logps: Tensor | None,
        epsilons: Sequence[float],
        dtype: torch.dtype,
    ) -> None:
        self.weights = weights.to(dtype)
        self._advantages = wide(advantages)
        self._old = None if old_logps is None else wide(old_logps)
        self._low, self._high = epsilons

    @property
    def magnitude(self) -> Tensor:
        """[N]: what the gradient's scale is measured by."""
        return self.weights * self._advantages.to(self.weights.dtype)

    def values(self, log_probabilities: Tensor) -> Tensor:
        """Of all tokens, before weights, from their log-probabilities [N]."""
        ratio = torch.ones_like(self._advantages)
        if self._old is not None:
            ratio = (wide(log_probabilities) - self._old).exp()
        free, clipped = (scaled(self._advantages, x) for x in (ratio, ratio.clamp(1 - self._low, 1 + self._high)))
        return -torch.minimum(free, clipped)

    def prepare(self, factor: Tensor) -> None:
        """What of the gradient, times a factor, is known before any log-probability is.

        It is -ratio * advantage * weight, and 0 where the clipped value is the lesser one: beyond the upper end of the
        interval, or with a negative advantage below the lower one.
        """
        slopes = -scaled(self.weights * factor, self._advantages)
        if self._old is None:  # a ratio of 1 is inside
            self.slopes = PolicySlopes(slopes.to(self.weights.dtype))
            return
        negative = self._advantages < 0
        most = torch.where(negative, torch.inf, 1 + self._high)
        # Where the weight is 0, no ratio counts, not even an infinite one: none compares with NaN.
        least = torch.where(negative, 1 - self._low, -torch.inf).masked_fill_(slopes == 0, torch.nan)
        self.slopes = PolicySlopes(slopes, self._old.contiguous(), least, most)


def unit_weights(
    token_weights: Tensor, dtype: torch.dtype, factor: float = 1.0, policy: PolicyGradient | None = None
) -> tuple[Tensor, Tensor]:
    """factor * token weights divided by a unit, and that unit, without synchronisation.

    The unit is a power of two, by which nothing is rounded, near the largest magnitude of what the gradients of one
    call are weighted with (1 if all are zero).
    """
    weights = token_weights.to(dtype)
    if factor != 1:
        weights = weights * factor
    one = weights.new_ones(())
    if not len(weights):
        return weights, one
    largest = torch.linalg.vector_norm(weights, torch.inf)
    if policy is not None:
        largest = torch.maximum(largest, torch.linalg.vector_norm(policy.magnitude, torch.inf))
    unit = torch.ldexp(one, torch.frexp(largest).exponent)  # of 0, which has the exponent 0, it is 1
    return weights / unit, unit
