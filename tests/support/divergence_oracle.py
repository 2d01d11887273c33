"""Every divergence from its definition (``vgs_kernels.reference``), called as the package's own functions are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import head_logits
from torch import Tensor

from vgs_kernels import Divergence
from vgs_kernels.reference import divergence_reference, kl_divergence, log_distributions
from vgs_kernels.reference import policy_reference as policy_values


@dataclass
class FamilyOutput:
    """Loss (carries grad) and detached terms [N], as the package's own output has them."""

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None
    policy: Tensor | None


def family_from_logits(
    student_logits: Tensor,
    target: Sequence[tuple[Any, Tensor]],
    *,
    divergence: str = "reverse_kl",
    token_weights: Tensor | None = None,
    reduction: str | None = None,
    target_ids: Tensor | None = None,
    policy: Any = None,
    **knobs: Any,
) -> FamilyOutput:
    """Loss and terms of final logits [N, V] and rows (coefficient, logits [N, V])."""
    settings = Divergence(divergence, **knobs)
    values = divergence_reference(student_logits, target, settings, target_ids)
    log_p, _, on_support = log_distributions(student_logits, target, settings)

    tokens = len(student_logits)
    uniform = student_logits.new_full((tokens,), 1.0 if reduction == "none" else 1.0 / max(tokens, 1))
    weights = uniform if token_weights is None else token_weights.to(student_logits)
    # a token of weight 0 is absent, even where it is infinite
    loss = torch.where(weights != 0, weights * torch.where(weights != 0, values, torch.zeros_like(values)), 0.0)
    policies = None
    if policy is not None:
        policies = policy_values(log_p.gather(1, target_ids[:, None]).squeeze(1), policy)
        loss = loss + policy.weights.to(student_logits) * policies
    total = loss if reduction == "none" else loss.sum()
    with torch.no_grad():
        log_e = on_support[0] if settings.support == "teacher_top_k" else log_p  # where the student is renormalised
        return FamilyOutput(
            loss=total,
            divergence=values.detach(),
            entropy=-kl_divergence(log_e, torch.zeros_like(log_e)),
            target_logps=None if target_ids is None else log_e.gather(1, target_ids[:, None]).squeeze(1),
            policy=None if policies is None else policies.detach(),
        )


def family_oracle(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Sequence[tuple[Any, ...]],
    *,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    vocab_size: int | None = None,
    **options: Any,
) -> FamilyOutput:
    """The same of hidden states and heads; rows (coefficient, hidden, weight[, bias[, scale[, soft-cap]]])."""

    def logits(hidden: Tensor, weight: Tensor, bias: Any = None, scale: float = 1.0, softcap: Any = None) -> Tensor:
        return head_logits(hidden, weight, bias, softcap=softcap, logit_scale=scale, vocab_size=vocab_size)

    student = logits(student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    with torch.no_grad():
        rows = [(coefficient, logits(*row)) for coefficient, *row in target]
    return family_from_logits(student, rows, **options)
