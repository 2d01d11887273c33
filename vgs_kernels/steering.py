"""Between the sweeps: weights, thresholds, gamma, loss and terms of one call, as arithmetic on [N] vectors.

This is the room where the method is readable and changeable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import gating
from .objective import VGSObjective
from .policy import PolicyGradient, unit_weights
from .rows import LogitTransform, RowCoefficients, Statistics, scaled


class Steering:
    """The [N]-vector arithmetic of one VGS call."""

    def __init__(
        self,
        objective: VGSObjective,
        token_weights: Tensor,
        vds: Tensor | None,
        vds_threshold: Tensor | None,
        trajectory_ids: Tensor | None,
        group_name: str | None,
        student: LogitTransform,
        dtype: torch.dtype,
        policy: PolicyGradient | None = None,
        target_ids: Tensor | None = None,
    ) -> None:
        self.objective = objective
        self.dtype = dtype
        self.gain = student.gain
        self.unit_weights, self.unit = unit_weights(token_weights, dtype, objective.eta, policy)
        self.policy, self._target_ids = policy, target_ids
        self.vds = None if vds is None else vds.to(dtype)
        self._scope = (trajectory_ids, group_name)
        self._bounded = objective.vds_scope == "call" and vds_threshold is None
        self.limits: list[Tensor] | None = None
        if vds_threshold is not None:
            n = len(token_weights)
            self.limits = [limit.expand(n) for limit in vds_threshold.to(dtype).reshape(-1, 1)]
        elif self.vds is not None:
            self.find_limits()

    @property
    def needs_vds_first(self) -> bool:
        """Whether the gradient of a token depends on the scores of all others."""
        return self.objective.schedule == "adaptive" and self.limits is None

    def find_limits(self) -> None:
        self.limits = gating.thresholds(self.vds, self.objective, *self._scope)

    @property
    def counts_gated_tokens(self) -> bool:
        """Whether only the host can tell how many tokens are gated: no quantile of this very call bounds them."""
        return not self._bounded

    def coefficients(
        self, rows: slice, state: Tensor, picked: Tensor | None, live_prior: bool = False, language: float = 0.0
    ) -> RowCoefficients:
        """Scalars of the gradient of standard + gamma * visual and of the policy term: raw gaps, for every normaliser
        cancels.

        With ``language`` also those of language * KL(p_x || q_x): of the gated tokens if the limits are known, else of
        all tokens.
        """
        x = Statistics(state)
        limits = None if self.limits is None else [limit[rows] for limit in self.limits]
        if limits is not None:
            vds = x.vds.to(self.dtype) if self.vds is None else self.vds[rows]
        if self.objective.schedule == "constant":
            gamma = torch.full_like(x["s_max"], self.objective.gamma)
        else:
            gamma = gating.token_gamma(vds, self.objective, limits)
        weight = self.gain * self.unit_weights[rows]
        mean_gap = (1 + gamma) * x.mean("s_gap") - scaled(gamma, x.mean("s_prior_gap"))
        weight, mean_gap, gamma = (value.to(state.dtype) for value in (weight, mean_gap, gamma))
        pull = chosen = None
        if self.policy is not None:
            slope = self.policy.evaluate(x.log_probability(picked), rows)[1]
            pull = scaled(self.gain * self.policy.weights[rows] / self.unit, slope).to(state.dtype)
            chosen = self._target_ids[rows]
        if not language:
            return RowCoefficients(weight, mean_gap, gamma, live_prior, policy=pull, chosen=chosen)
        language_weight = language * (weight if limits is None else weight * (vds > limits[-1]))
        language_mean_gap = x.mean("a_gap").to(state.dtype)
        return RowCoefficients(weight, mean_gap, gamma, live_prior, language_weight, language_mean_gap, pull, chosen)

    def finish(self, state: Tensor, target_logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss and terms from the statistics of all tokens; settles the gate."""
        x = Statistics(state)
        if self.vds is None:
            self.vds = x.vds.to(self.dtype)
        if self.limits is None:
            self.find_limits()
        self.gate = self.vds > self.limits[-1]
        gamma = gating.token_gamma(self.vds, self.objective, self.limits)
        standard, visual, language = x.standard, x.visual, x.language
        per_token = (
            standard + scaled(gamma, visual) + scaled(self.objective.lam * self.gate.to(language.dtype), language)
        )
        loss = scaled(self.unit_weights * self.unit, per_token).sum()
        terms = [standard, visual, language, self.vds, self.gate, x.entropy, x.student_vds]
        if target_logits is not None:
            terms.append(x.log_probability(target_logits))
        if self.policy is not None:
            values = self.policy.evaluate(terms[-1], slice(None))[0]
            loss = loss + scaled(self.policy.weights, values).sum()
            terms.append(values)
        return loss.to(self.dtype), torch.stack([term.to(self.dtype) for term in terms])

    def language_weights(self) -> Tensor:
        """Weights of KL(p_x || q_x) before lam, [N]; zero where the gate is closed."""
        return self.unit_weights * self.gate

    def gated_tokens(self) -> Tensor:
        """Indices of (at least) all gated tokens. Only a quantile of this very call bounds their number beforehand;
        else counting them synchronises a GPU once."""
        if self._bounded:
            count = gating.max_gated(len(self.vds), self.objective)
            return torch.topk(self.vds, count, sorted=False).indices.sort().values
        return self.gate.nonzero().squeeze(1)
