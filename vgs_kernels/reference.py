"""The definition: the VGS objective and its relatives on dense logits in plain PyTorch, to be read beside the papers.

Slow and memory-hungry by design; everything else in this package must equal it. Gradients come from autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .divergence import Divergence
from .gating import thresholds, token_gamma
from .objective import VGSObjective
from .parallel import group_name
from .policy import PolicyTerm
from .rows import scaled


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, [..., V] -> [...]; a column with p = 0 contributes nothing."""
    excluded = log_p.exp() == 0
    # Fill before the subtraction too: autograd would turn -inf - (-inf) into NaN even where the result is discarded.
    gap = log_p.masked_fill(excluded, 0) - log_q.masked_fill(excluded, 0)
    return (log_p.exp() * gap).sum(-1)


def steered_target(log_px: Tensor, log_qI: Tensor, log_qx: Tensor) -> Tensor:
    """log q* of Eq. 9-10, normalised: [N, V]. A column that any of the three excludes is outside its support."""
    excluded = (log_px == -torch.inf) | (log_qI == -torch.inf) | (log_qx == -torch.inf)
    unnormalised = log_px + log_qI.masked_fill(excluded, 0) - log_qx.masked_fill(excluded, 0)
    return torch.log_softmax(unnormalised.masked_fill(excluded, -torch.inf), dim=-1)


def vgs_reference(
    student_logits: Tensor,
    student_text_logits: Tensor,
    teacher_logits: Tensor,
    teacher_text_logits: Tensor,
    objective: VGSObjective,
    token_weights: Tensor | None = None,
    *,
    vds: Tensor | None = None,
    vds_threshold: tuple[float, ...] | None = None,
    trajectory_ids: Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The VGS loss and its terms from four [N, V] blocks of logits, in their own precision.

    Args:
        student_logits, student_text_logits: student with and without the image; carry gradient.
        teacher_logits, teacher_text_logits: teacher with and without the image.
        objective: see :class:`VGSObjective`.
        token_weights: [N]; None means 1/N each.
        vds, vds_threshold, trajectory_ids, process_group: as in :func:`vgs_kernels.fused_linear_vgs_loss`.

    Returns:
        ``loss`` (0-d) and, per token, ``standard``, ``visual``, ``language``, ``vds``, ``gate``, ``gamma``,
        ``entropy`` and ``student_vds``, [N] each.
    """
    log_pI, log_px = (torch.log_softmax(x / objective.temperature, -1) for x in (student_logits, student_text_logits))
    with torch.no_grad():
        log_qI, log_qx = (
            torch.log_softmax(x / objective.temperature, -1) for x in (teacher_logits, teacher_text_logits)
        )
    prior = log_px.detach() if objective.detach_prior else log_px

    standard = kl_divergence(log_pI, log_qI)  # Eq. 3-4
    language = kl_divergence(log_px, log_qx)  # Eq. 6-7
    visual = kl_divergence(log_pI, steered_target(prior, log_qI, log_qx))  # Eq. 9-11
    with torch.no_grad():
        vds = kl_divergence(log_qI, log_qx) if vds is None else vds  # Eq. 12
        if vds_threshold is None:
            limits = thresholds(vds, objective, trajectory_ids, group_name(process_group))
        else:
            limits = [torch.full_like(vds, value) for value in vds_threshold]
        gate = vds > limits[-1]
        gamma = token_gamma(vds, objective, limits)
    weights = torch.full_like(standard, 1 / max(len(standard), 1)) if token_weights is None else token_weights
    per_token = (
        standard + scaled(gamma, visual) + scaled(objective.lam * gate.to(vds.dtype), language)
    )  # Eq. 13-18, 24-25
    return {
        "loss": objective.eta * scaled(weights, per_token).sum(),
        "standard": standard,
        "visual": visual,
        "language": language,
        "vds": vds,
        "gate": gate,
        "gamma": gamma,
        "entropy": -(log_pI.exp() * log_pI.masked_fill(log_pI == -torch.inf, 0)).sum(-1),
        "student_vds": kl_divergence(log_pI, log_px),
    }


def policy_reference(log_probabilities: Tensor, policy: PolicyTerm) -> Tensor:
    """Loss of the clipped policy gradient (PPO, arXiv 1707.06347, Eq. 7) per token, before its weights: [N]."""
    old = log_probabilities.detach() if policy.old_logps is None else policy.old_logps
    ratio = (log_probabilities - old).exp()
    clipped = ratio.clamp(1 - policy.epsilon_low, 1 + policy.epsilon_high)
    return -torch.minimum(ratio * policy.advantages, clipped * policy.advantages)


def divergence_reference(
    student_logits: Tensor,
    target: Sequence[tuple[float | Tensor, Tensor]],
    divergence: Divergence,
    target_ids: Tensor | None = None,
) -> Tensor:
    """D(softmax(student) || softmax(sum_k c_k * logits_k)) per token, [N], with gradient to the student's logits.

    Its gradient (autograd's) is NaN where an entry that is clipped is infinite, and where a tail is empty.

    Args:
        student_logits: [N, V].
        target: addends (c_k, logits [N, V]); c_k is a number or [N].
        divergence: see :class:`Divergence`.
        target_ids: [N], needed by ``"sampled_reverse_kl"``.
    """
    s = student_logits / divergence.temperature
    with torch.no_grad():
        t, first, inside = torch.zeros_like(s), target[0][1] / divergence.temperature, torch.ones_like(s, dtype=bool)
        masked = torch.zeros_like(inside)
        for coefficient, logits in target:
            masked |= logits == -torch.inf
            t = t + torch.as_tensor(coefficient, dtype=s.dtype, device=s.device).reshape(-1, 1) * logits.masked_fill(
                masked, 0
            )
        t = (t / divergence.temperature).masked_fill(masked, -torch.inf)
        if divergence.support == "plausible":
            inside = first >= first.amax(1, keepdim=True) + math.log(divergence.plausibility)
        elif divergence.support != "full":
            ranked = t if divergence.support == "teacher_top_k" else s
            inside = (ranked >= ranked.topk(divergence.top_k).values[:, -1:]) & (ranked > -torch.inf)
    if divergence.support == "teacher_top_k":
        s = s.masked_fill(~inside, -torch.inf)
    if divergence.support in ("teacher_top_k", "plausible"):
        t = t.masked_fill(~inside, -torch.inf)
    log_p, log_q = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    if divergence.divergence == "sampled_reverse_kl":
        log_p, log_q = (x.gather(1, target_ids.unsqueeze(1)).squeeze(1) for x in (log_p, log_q))
        ratio = (log_p - log_q).detach()
        if divergence.token_clip is not None:
            ratio = ratio.clamp(-divergence.token_clip, divergence.token_clip)
        return divergence.scale * (ratio + ratio * (log_p - log_p.detach()))
    if divergence.support == "student_top_k":
        tails = [x.masked_fill(inside, -torch.inf).logsumexp(1, keepdim=True) for x in (log_p, log_q)]
        log_p, log_q = (torch.cat([x, tail], 1) for x, tail in zip((log_p, log_q), tails, strict=True))
        inside = torch.cat([inside, torch.ones_like(inside[:, :1])], 1)
    entries = _entries(log_p, log_q, divergence)
    if divergence.support == "student_top_k":  # elsewhere the target is 0 outside
        entries = entries.masked_fill(~inside, 0)
    if divergence.clip is not None:
        entries = entries.clamp(max=divergence.clip)
    values = entries.sum(1)
    return divergence.scale * (values if divergence.token_clip is None else values.clamp(max=divergence.token_clip))


def _entries(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Addends of the divergence, [N, V]; 0 * log 0 is 0."""

    def part(log_x: Tensor, log_y: Tensor) -> Tensor:
        empty = log_x == -torch.inf  # filled before the subtraction: autograd would turn inf - inf into NaN
        return log_x.exp() * (log_x.masked_fill(empty, 0) - log_y.masked_fill(empty, 0))

    if divergence.kind == "reverse_kl":
        return part(log_p, log_q)
    if divergence.kind == "forward_kl":
        return part(log_q, log_p)
    beta = divergence.beta
    both = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_m = torch.logaddexp(log_p.masked_fill(both, 0) + math.log1p(-beta), log_q.masked_fill(both, 0) + math.log(beta))
    return beta * part(log_q, log_m) + (1 - beta) * part(log_p, log_m)
