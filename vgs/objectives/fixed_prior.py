"""Visual Gradient Steering with a prior that is not the student's own: frozen at the start, or averaged."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vgs_kernels import PolicyTerm, VGSObjective, VGSOutput
from vgs_kernels.gating import token_gamma
from vgs_kernels.outputs import shares

from ..models.heads import Head
from .definitions import STEERING, TEACHER, Addend, Preset, Rows, WithPrior, limits_of, row


@dataclass(frozen=True)
class Anchored(WithPrior):
    """Visual Gradient Steering whose prior comes from a frozen or averaged student, a constant. The logged loss lacks
    the constant of ``WithPrior``; of the steered terms only language and vds are formed, so that nothing is watched for
    collapse."""

    target: tuple[Addend, ...] = (TEACHER, Addend(1.0, "prior", "text"), Addend(-1.0, "teacher", "text"))

    steered = True
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
        limits = None if vds is None else limits_of(vds, objective, trajectory_ids, vds_threshold)
        if objective.gamma > 0:
            gamma = torch.full_like(weights, objective.gamma) if limits is None else token_gamma(vds, objective, limits)
            prior = row(prior_head, teacher_rows["prior"], 1.0)
        sampled = {"target_ids": target_ids, "policy": policy}
        output = self.steered_loss(
            student_rows, teacher_rows, student_head, teacher_head, prior, gamma, weights, **sampled, **options
        )
        found = VGSOutput(
            output.loss,
            vds=vds,
            entropy=output.entropy,
            target_logps=output.target_logps,
            policy=output.policy,
            **shares(output),
        )
        if objective.lam == 0:
            return found
        gate = vds > limits[-1]
        weights = objective.lam * weights * gate
        language = self.language_loss(student_rows, teacher_rows, student_head, teacher_head, weights, **options)
        return replace(found, loss=output.loss + language.loss, language=language.divergence, gate=gate)


def anchored(preset: Preset) -> Anchored:
    """A preset that steers, with such a prior."""
    names = [field.name for field in dataclasses.fields(Preset) if field.name != "target"]
    return Anchored(**{name: getattr(preset, name) for name in names})
