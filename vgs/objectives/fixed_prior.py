"""Visual Gradient Steering with a prior that is not the student's own: frozen at the start, or averaged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgs_kernels import PolicyTerm, VGSObjective, VGSOutput
from vgs_kernels.gating import token_gamma
from vgs_kernels.outputs import shares
from vgs_kernels.rows.layout import scaled

from ..models.forward import fused_loss
from ..models.heads import Head
from .definitions import STEERING, TEACHER, Addend, Preset, Rows, WithPrior, limits_of, row


@dataclass(frozen=True)
class Anchored(WithPrior):
    """Visual Gradient Steering whose prior comes from a frozen or averaged student, a constant.

    With ``return_terms`` the loss has all terms and its whole value, for seven further products of rows with a head and
    no gradient; without them it has those that it needs, and lacks the constant of ``WithPrior``.
    """

    target: tuple[Addend, ...] = (TEACHER, Addend(1.0, "prior", "text"), Addend(-1.0, "teacher", "text"))

    steered = True
    has_terms = True
    own_settings = STEERING

    def needs_text(self, objective: VGSObjective) -> bool:
        return objective.needs_text

    def needs_own_text(self, objective: VGSObjective) -> bool:
        return objective.lam > 0

    def needs_text_gradient(self, objective: VGSObjective) -> bool:
        return objective.lam > 0

    def needs_vds(self, objective: VGSObjective, split: bool) -> bool:
        return objective.lam > 0 or (objective.schedule == "adaptive" and objective.gamma > 0)

    def loss(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        *,
        objective: VGSObjective,
        token_weights: Tensor,
        prior_head: Head | None = None,
        target_ids: Tensor | None = None,
        trajectory_ids: Tensor | None = None,
        policy: PolicyTerm | None = None,
        vds: Tensor | None = None,
        vds_threshold: Tensor | None = None,
        return_terms: bool = True,
        **options: Any,
    ) -> VGSOutput:
        """As of ``Preset``; ``teacher_rows["prior"]`` [N, Ds] goes with ``prior_head``; gamma 0 needs neither."""
        weights, gamma, prior = objective.eta * token_weights, None, None
        rows = student_rows, teacher_rows, student_head, teacher_head
        found: dict[str, Any] = {"vds": vds}
        if return_terms:
            terms = self._terms(*rows, objective, weights, prior_head, **options)
            found = terms if vds is None else {**terms, "vds": vds}
        limits = None
        if self.needs_vds(objective, split=False):
            limits = limits_of(found["vds"], objective, trajectory_ids, vds_threshold)
        if objective.gamma > 0:
            gamma = torch.full_like(weights, objective.gamma)
            if limits is not None:
                gamma = token_gamma(found["vds"], objective, limits)
            prior = row(prior_head, teacher_rows["prior"], 1.0)
        sampled = {"target_ids": target_ids, "policy": policy}
        output = self.steered_loss(*rows, prior, gamma, weights, **sampled, **options)
        loss = output.loss
        if objective.lam > 0:
            found["gate"] = found["vds"] > limits[-1]
            language = self.language_loss(*rows, objective.lam * weights * found["gate"], **options)
            loss, found["language"] = loss + language.loss, language.divergence
        if return_terms and gamma is not None:
            whole = found["standard"] + scaled(gamma, found["visual"])
            loss = loss + scaled(weights, whole - (1 + gamma) * output.divergence).sum()
        found |= {name: getattr(output, name) for name in ("entropy", "target_logps", "policy")}
        return VGSOutput(loss, **found, **shares(output))

    @torch.no_grad()
    def _terms(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        objective: VGSObjective,
        weights: Tensor,
        prior_head: Head | None,
        **options: Any,
    ) -> dict[str, Tensor | None]:
        """Every term of every token; ``visual`` is None without a prior, which gamma 0 does not ask."""
        rows = [[part[view].detach() for view in ("image", "text")] for part in (student_rows, teacher_rows)]
        plain = VGSObjective(temperature=objective.temperature, gamma=0.0, lam=0.0)
        seen = fused_loss(*rows, student_head, teacher_head, plain, token_weights=weights, **options)
        found = {name: getattr(seen, name) for name in ("standard", "language", "vds", "student_vds")}
        if prior_head is None:
            return {**found, "visual": None}
        target = [row(teacher_head, x, factor) for x, factor in zip(rows[1], (1.0, -1.0), strict=True)]
        target.append(row(prior_head, teacher_rows["prior"], 1.0))
        output = self.divergence_loss(rows[0][0], student_head, target, token_weights=weights, **options)
        return {**found, "visual": output.divergence}


def anchored(preset: Preset) -> Anchored:
    """A preset that steers, with such a prior."""
    names = [field.name for field in dataclasses.fields(Preset) if field.name != "target"]
    return Anchored(**{name: getattr(preset, name) for name in names})
