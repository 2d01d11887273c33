"""The definition of every loss: dense logits, explicit sums, gradients from autograd, to be read beside the papers.

Written from the papers alone and deliberately naive. Nothing here uses the composed target, the raw-logit gradient or
the running sums that the kernels are built on, so that an error in one of those cannot hide in both. Everything runs in
the dtype of the logits; the tests compare the losses with it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .divergence import Divergence
from .objective import VGSObjective
from .policy import PolicyTerm

NEG_INF = -math.inf


def relative_entropy(log_a: Tensor, log_b: Tensor) -> Tensor:
    """a log(a / b) of each entry: 0 where a is 0, a constant infinity where b alone is."""
    present, excluded = log_a.exp() > 0, log_b == NEG_INF
    a, b = (x.masked_fill(~present | excluded, 0) for x in (log_a, log_b))
    return (a.exp() * (a - b)).masked_fill(present & excluded, math.inf)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) as the plain sum of p * (log p - log q) over the last dimension."""
    return relative_entropy(log_p, log_q).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """The entropy of p over the last dimension."""
    return -kl_divergence(log_p, torch.zeros_like(log_p))


def steered_target(log_px: Tensor, log_qi: Tensor, log_qx: Tensor) -> Tensor:
    """log q* = log p_x + log q_I - log q_x - log Z* (Eq. 9-10); no mass on a column that one of the rows excludes."""
    excluded = (log_px == NEG_INF) | (log_qi == NEG_INF) | (log_qx == NEG_INF)
    raw = torch.where(excluded, NEG_INF, log_px + log_qi - log_qx)
    return raw - torch.logsumexp(raw, dim=-1, keepdim=True)


def _thresholds(
    vds: Tensor, quantile: float, trajectory_ids: Tensor | None, pool: Tensor | None, counted: Tensor
) -> Tensor:
    """The quantile of each token's own trajectory, or of ``pool`` (default: this call), [N].

    Tokens that do not count are in no quantile, and below every threshold.
    """
    out = torch.full_like(vds, math.inf)
    trajectory_ids = torch.zeros_like(vds) if trajectory_ids is None else trajectory_ids
    for trajectory in trajectory_ids[counted].unique():
        members = counted & (trajectory_ids == trajectory)
        out[members] = torch.quantile(vds[members] if pool is None else pool, quantile)
    return out


def gate_and_gamma(
    vds: Tensor,
    objective: VGSObjective,
    vds_threshold: float | Sequence[float] | None = None,
    trajectory_ids: Tensor | None = None,
    pool: Tensor | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gate [N] bool, strictly above the upper threshold, and gamma [N] (Eq. 16, 24-25).

    Args:
        vds: [N] visual dependency scores.
        objective: see :class:`VGSObjective`.
        vds_threshold: known thresholds, a number or, of the adaptive schedule, a pair.
        trajectory_ids: [N], for the scope of trajectories.
        pool: the scores of all ranks, for a quantile across ranks.
        counted: [N] bool, tokens that take part; None means all.
    """
    counted = torch.ones_like(vds, dtype=torch.bool) if counted is None else counted
    if vds_threshold is not None:
        limits = list(vds_threshold) if isinstance(vds_threshold, Sequence) else [vds_threshold]
    else:
        ids = trajectory_ids if objective.vds_scope == "trajectory" else None
        adaptive = [objective.adaptive_quantile] if objective.schedule == "adaptive" else []
        limits = [_thresholds(vds, q, ids, pool, counted) for q in (*adaptive, objective.vds_quantile)]
    gamma = torch.full_like(vds, objective.gamma)
    if objective.schedule == "adaptive":
        gamma = torch.where(vds > limits[1], gamma, torch.where(vds > limits[0], gamma / 2, 0))
    return (vds > limits[-1]) & counted, gamma


def _weighted(coefficient: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """c_n KL_n of the rows that count: a term with coefficient 0 is absent, even where it is infinite."""
    rows = coefficient != 0
    return (coefficient[rows] * kl_divergence(log_p[rows], log_q[rows])).sum()


def vgs_reference(
    student_logits: Tensor,
    student_text_logits: Tensor,
    teacher_logits: Tensor,
    teacher_text_logits: Tensor,
    objective: VGSObjective,
    token_weights: Tensor | None = None,
    *,
    target_ids: Tensor | None = None,
    vds: Tensor | None = None,
    vds_threshold: float | Sequence[float] | None = None,
    trajectory_ids: Tensor | None = None,
    vds_pool: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The VGS loss and its terms from four [N, V] blocks of logits, temperature not yet applied.

    Args:
        student_logits, student_text_logits, teacher_logits, teacher_text_logits: [N, V] each, with and without the
            image; the student's carry gradient.
        objective: see :class:`VGSObjective`.
        token_weights: [N]; None means 1/N each.
        target_ids, vds, vds_threshold, trajectory_ids: as in :func:`vgs_kernels.fused_linear_vgs_loss`.
        vds_pool: the scores of all ranks, for a quantile across ranks.

    Returns:
        ``loss`` (0-d) and, detached, the terms of :class:`vgs_kernels.VGSOutput` and ``gamma``, [N] each.
    """
    rows = (student_logits, student_text_logits, teacher_logits, teacher_text_logits)
    log_pi, log_px, log_qi, log_qx = ((row / objective.temperature).log_softmax(-1) for row in rows)
    log_qi, log_qx = log_qi.detach(), log_qx.detach()
    log_star = steered_target(log_px.detach() if objective.detach_prior else log_px, log_qi, log_qx)

    scores = kl_divergence(log_qi, log_qx) if vds is None else vds  # Eq. 12
    if token_weights is None:
        token_weights = student_logits.new_full((len(scores),), 1.0 / max(len(scores), 1))
    counted = token_weights != 0
    gate, gamma = gate_and_gamma(scores.double(), objective, vds_threshold, trajectory_ids, vds_pool, counted)
    step = token_weights.to(student_logits.dtype) * objective.eta
    loss = (  # Eq. 3-4, 9-11, 13-18
        _weighted(step, log_pi, log_qi)
        + _weighted(step * gamma.to(step.dtype), log_pi, log_star)
        + _weighted(step * objective.lam * gate.to(step.dtype), log_px, log_qx)
    )
    with torch.no_grad():
        return {
            "loss": loss,
            "standard": kl_divergence(log_pi, log_qi),
            "visual": kl_divergence(log_pi, log_star),
            "language": kl_divergence(log_px, log_qx),
            "vds": scores,
            "gate": gate,
            "gamma": gamma,
            "entropy": entropy(log_pi),
            "student_vds": kl_divergence(log_pi, log_px),
            "target_logps": None if target_ids is None else log_pi.gather(-1, target_ids[:, None]).squeeze(-1),
        }


def policy_reference(log_probabilities: Tensor, policy: PolicyTerm) -> Tensor:
    """The clipped policy gradient (PPO, arXiv 1707.06347, Eq. 7) per token, before its weights: [N]."""
    advantages = policy.advantages.to(log_probabilities)
    old = log_probabilities.detach() if policy.old_logps is None else policy.old_logps.to(log_probabilities)
    ratio = (log_probabilities - old).exp()
    bounded = ratio.clamp(1 - policy.epsilon_low, 1 + policy.epsilon_high)
    return -torch.minimum(ratio * advantages, bounded * advantages)


def _safe_log(x: Tensor) -> Tensor:
    """log x, and -inf without a gradient at 0."""
    return x.masked_fill(x == 0, 1).log().masked_fill(x == 0, NEG_INF)


def _entries(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """What each vocabulary entry adds to the divergence."""
    if divergence == "jsd" and 0 < beta < 1:
        log_m = _safe_log(beta * log_q.exp() + (1 - beta) * log_p.exp())
        return beta * relative_entropy(log_q, log_m) + (1 - beta) * relative_entropy(log_p, log_m)
    forward = divergence == "forward_kl" or (divergence == "jsd" and beta == 0)
    return relative_entropy(log_q, log_p) if forward else relative_entropy(log_p, log_q)


def _greatest(log_x: Tensor, k: int) -> Tensor:
    """The k greatest of each row, and whatever equals the last of them."""
    return log_x >= log_x.topk(k, dim=-1).values[:, -1:]


def _with_tail(log_x: Tensor, inside: Tensor) -> Tensor:
    """Entries outside replaced by one more entry, their sum."""
    tail = (log_x.exp() * ~inside).sum(-1, keepdim=True)
    return torch.cat([log_x.masked_fill(~inside, NEG_INF), _safe_log(tail)], dim=-1)


def supported(log_p: Tensor, log_q: Tensor, log_q0: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Both log-distributions [N, V] on the support; ``log_q0`` is that of the target's first row."""

    def renormalised(log_x: Tensor, inside: Tensor) -> Tensor:
        return log_x.masked_fill(~inside, NEG_INF).log_softmax(-1)

    if divergence.support == "teacher_top_k":
        inside = _greatest(log_q, divergence.top_k)
        return renormalised(log_p, inside), renormalised(log_q, inside)
    if divergence.support == "student_top_k":
        inside = _greatest(log_p.detach(), divergence.top_k)
        return _with_tail(log_p, inside), _with_tail(log_q, inside)
    if divergence.support == "plausible":
        return log_p, renormalised(log_q, log_q0.exp() >= divergence.plausibility * log_q0.exp().amax(-1, keepdim=True))
    return log_p, log_q


def composed(target: Sequence[tuple[float | Tensor, Tensor]]) -> Tensor:
    """sum_k c_k * logits_k; a column that one of the rows excludes is excluded."""
    total, excluded = 0.0, False
    for coefficient, logits in target:
        c = torch.as_tensor(coefficient, dtype=logits.dtype, device=logits.device).reshape(-1, 1)
        total = total + c * logits.masked_fill(logits == NEG_INF, 0)
        excluded = excluded | ((logits == NEG_INF) & (c != 0))
    return total.masked_fill(excluded, NEG_INF)


def log_distributions(
    student_logits: Tensor, target: Sequence[tuple[float | Tensor, Tensor]], divergence: Divergence
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """log p and log q over the vocabulary, and both on the support."""
    rows = (student_logits, composed(target).detach(), target[0][1].detach())
    log_p, log_q, log_q0 = ((x / divergence.temperature).log_softmax(-1) for x in rows)
    return log_p, log_q, supported(log_p, log_q, log_q0, divergence)


def divergence_reference(
    student_logits: Tensor,
    target: Sequence[tuple[float | Tensor, Tensor]],
    divergence: Divergence,
    target_ids: Tensor | None = None,
) -> Tensor:
    """D(softmax(student) || softmax(sum_k c_k * logits_k)) per token, [N], with gradient to the student's logits.

    Args:
        student_logits: [N, V].
        target: addends (c_k, logits [N, V]); c_k is a number or [N].
        divergence: see :class:`Divergence`.
        target_ids: [N], needed by ``"sampled_reverse_kl"``.
    """
    log_p, log_q, on_support = log_distributions(student_logits, target, divergence)
    clip, token_clip = (math.inf if x is None else x for x in (divergence.clip, divergence.token_clip))
    if divergence.divergence == "sampled_reverse_kl":
        log_p, log_q = (x.gather(1, target_ids[:, None]).squeeze(1) for x in (log_p, log_q))
        ratio = (log_p - log_q).detach().clamp(-token_clip, token_clip)
        return divergence.scale * (ratio + ratio * (log_p - log_p.detach()))  # one's value, the other's gradient
    values = _entries(*on_support, divergence.divergence, divergence.beta).clamp(max=clip).sum(-1)
    return divergence.scale * values.clamp(max=token_clip)
