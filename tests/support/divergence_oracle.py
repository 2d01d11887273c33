"""Every divergence to a composed target from its definition, for tests: dense logits and PyTorch autograd.

Written from the published formulas, in the dtype of the logits: float64 as the oracle, float32 or a 16-bit projection
as the "plain PyTorch" to compare with. Sums are spelt out and supports are masks over the whole vocabulary; nothing is
shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import NEG_INF, head_logits
from torch import Tensor

Pair = tuple[Tensor, Tensor]


@dataclass
class FamilyOutput:
    """Loss (carries grad) and detached terms [N], as the package's own output has them."""

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None
    policy: Tensor | None


def relative(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b) [N, V]: 0 where a is 0, a constant infinity where b alone is."""
    present = log_a.exp() > 0
    finite = present & (log_b > NEG_INF)
    zeros = torch.zeros_like(log_a)
    a, b = torch.where(finite, log_a, zeros), torch.where(finite, log_b, zeros)
    value = torch.where(finite, a.exp() * (a - b), zeros)
    return torch.where(present & ~finite, torch.full_like(value, math.inf), value)


def safe_log(x: Tensor) -> Tensor:
    """log x, and -inf without a gradient at 0."""
    return torch.where(x > 0, torch.where(x > 0, x, torch.ones_like(x)).log(), torch.full_like(x, NEG_INF))


def entries(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """What each vocabulary entry adds to the divergence."""
    if divergence == "jsd" and 0 < beta < 1:
        log_m = safe_log(beta * log_q.exp() + (1 - beta) * log_p.exp())
        return beta * relative(log_q, log_m) + (1 - beta) * relative(log_p, log_m)
    forward = divergence == "forward_kl" or (divergence == "jsd" and beta == 0)
    return relative(log_q, log_p) if forward else relative(log_p, log_q)


def keep(log_x: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, log_x, torch.full_like(log_x, NEG_INF))


def greatest(log_x: Tensor, k: int) -> Tensor:
    """The k greatest of each row, and whatever equals the last of them."""
    return log_x >= log_x.topk(k, dim=-1).values[:, -1:]


def with_tail(log_x: Tensor, inside: Tensor) -> Tensor:
    """Entries outside replaced by one more entry, their sum."""
    tail = (log_x.exp() * ~inside).sum(-1, keepdim=True)
    return torch.cat([keep(log_x, inside), safe_log(tail)], dim=-1)


def supported(log_p: Tensor, log_q: Tensor, log_q0: Tensor, support: str, top_k: Any, plausibility: Any) -> Pair:
    """Both log-distributions on the support."""
    if support == "teacher_top_k":
        inside = greatest(log_q, top_k)
        return keep(log_p, inside).log_softmax(-1), keep(log_q, inside).log_softmax(-1)
    if support == "student_top_k":
        inside = greatest(log_p.detach(), top_k)
        return with_tail(log_p, inside), with_tail(log_q, inside)
    if support == "plausible":
        inside = log_q0.exp() >= plausibility * log_q0.exp().amax(-1, keepdim=True)
        return log_p, keep(log_q, inside).log_softmax(-1)
    return log_p, log_q


def composed(target: Sequence[tuple[Any, Tensor]]) -> Tensor:
    """sum_k c_k * logits_k; a column that one of the rows excludes is excluded."""
    total, excluded = 0.0, False
    for coefficient, logits in target:
        c = torch.as_tensor(coefficient, dtype=logits.dtype, device=logits.device).reshape(-1, 1)
        total = total + torch.where(logits > NEG_INF, c * logits, torch.zeros_like(logits))
        excluded = excluded | ((logits == NEG_INF) & (c != 0))
    return torch.where(excluded, torch.full_like(total, NEG_INF), total)


def policy_values(log_p_y: Tensor, policy: Any) -> Tensor:
    """-min(ratio * A, clamp(ratio) * A) [N]."""
    advantages = policy.advantages.to(log_p_y)
    old = log_p_y.detach() if policy.old_logps is None else policy.old_logps.to(log_p_y)
    ratio = (log_p_y - old).exp()
    bounded = ratio.clamp(1 - policy.epsilon_low, 1 + policy.epsilon_high)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def family_from_logits(
    student_logits: Tensor,
    target: Sequence[tuple[Any, Tensor]],
    *,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    support: str = "full",
    top_k: int | None = None,
    plausibility: float | None = None,
    clip: float | None = None,
    token_clip: float | None = None,
    temperature: float = 1.0,
    temperature_squared: bool = False,
    token_weights: Tensor | None = None,
    reduction: str = "sum",
    target_ids: Tensor | None = None,
    policy: Any = None,
) -> FamilyOutput:
    """Loss and terms of final logits [N, V] and rows (coefficient, logits [N, V])."""
    log_p = (student_logits / temperature).log_softmax(-1)
    log_q = (composed(target).detach() / temperature).log_softmax(-1)
    log_q0 = (target[0][1].detach() / temperature).log_softmax(-1)
    log_p_y = None if target_ids is None else log_p.gather(1, target_ids[:, None]).squeeze(1)
    on_support = supported(log_p, log_q, log_q0, support, top_k, plausibility)

    if divergence == "sampled_reverse_kl":
        ratio = (log_p_y - log_q.gather(1, target_ids[:, None]).squeeze(1)).detach()
        if token_clip is not None:
            ratio = ratio.clamp(-token_clip, token_clip)
        values = ratio + ratio * (log_p_y - log_p_y.detach())  # the value of one, the gradient of the other
    else:
        values = entries(*on_support, divergence, beta)
        if clip is not None:
            values = values.clamp(max=clip)
        values = values.sum(-1)
        if token_clip is not None:
            values = values.clamp(max=token_clip)
    if temperature_squared:
        values = values * temperature**2

    tokens = len(student_logits)
    uniform = student_logits.new_full((tokens,), 1.0 if reduction == "none" else 1.0 / max(tokens, 1))
    weights = uniform if token_weights is None else token_weights.to(student_logits)
    # a token of weight 0 is absent, even where it is infinite
    loss = torch.where(weights != 0, weights * torch.where(weights != 0, values, torch.zeros_like(values)), 0.0)
    policies = None if policy is None else policy_values(log_p_y, policy)
    if policy is not None:
        loss = loss + policy.weights.to(student_logits) * policies
    if reduction == "sum":
        loss = loss.sum()
    with torch.no_grad():
        log_e = on_support[0] if support == "teacher_top_k" else log_p  # where the student is renormalised
        return FamilyOutput(
            loss=loss,
            divergence=values.detach(),
            entropy=-relative(log_e, torch.zeros_like(log_e)).sum(-1),
            target_logps=None if log_p_y is None else log_e.gather(1, target_ids[:, None]).squeeze(1),
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
