"""The definition: the VGS objective on dense logits in plain PyTorch, to be read beside arXiv 2606.00564.

Slow and memory-hungry by design; everything else in this package must equal it. Gradients come from autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gating import thresholds, token_gamma
from .objective import VGSObjective
from .parallel import group_name
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
