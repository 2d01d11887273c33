"""The VGS objective from the paper's definitions, for tests: dense logits, explicit KLs, PyTorch autograd.

Written from arXiv 2606.00564 alone and deliberately naive. Nothing here uses the composed target, the raw-logit
gradient or the running sums that the package is built on, so that an error in one of those cannot hide in both.
Everything runs in the dtype of the logits: float64 as the oracle, float32 or a 16-bit projection as the "plain PyTorch"
to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NEG_INF = -math.inf


@dataclass
class OracleOutput:
    """Loss (0-d, carries grad) and detached per-token terms [N]."""

    loss: Tensor
    standard: Tensor
    visual: Tensor
    language: Tensor
    vds: Tensor
    gate: Tensor
    gamma: Tensor
    entropy: Tensor
    student_vds: Tensor
    target_logps: Tensor | None


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Logits [N, V]: linear layer, scale, soft-cap, temperature; only the first ``vocab_size`` columns."""
    logits = torch.nn.functional.linear(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size])
    if logits.dtype in (torch.bfloat16, torch.float16):  # what a trainer does: a 16-bit projection, then a float32 loss
        logits = logits.float()
    logits = logits * logit_scale
    if softcap is not None:
        # a column masked with -inf stays masked: the cap bounds logits, it does not bring columns back
        logits = torch.where(logits > NEG_INF, softcap * torch.tanh(logits / softcap), logits)
    return logits / temperature


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [N] as the plain sum of p * (log p - log q), with 0 * inf = 0."""
    p = log_p.exp()
    difference = torch.where(p > 0, log_p - log_q, torch.zeros_like(log_p))
    return (p * difference).sum(-1)


def steered_target(log_px: Tensor, log_qi: Tensor, log_qx: Tensor) -> Tensor:
    """log q* = log p_x + log q_I - log q_x - log Z*; no mass on a column that one of the three rows excludes."""
    allowed = (log_px > NEG_INF) & (log_qi > NEG_INF) & (log_qx > NEG_INF)
    raw = torch.where(allowed, log_px + log_qi - log_qx, torch.full_like(log_px, NEG_INF))
    return raw - torch.logsumexp(raw, dim=-1, keepdim=True)


def thresholds(vds: Tensor, quantile: float, *, trajectory_ids: Tensor | None, pool: Tensor | None) -> Tensor:
    """Per-token threshold [N]: the quantile of the token's own trajectory, or of ``pool`` (default: this call)."""
    if trajectory_ids is None:
        return torch.quantile(vds if pool is None else pool, quantile).expand_as(vds)
    out = torch.empty_like(vds)
    for trajectory in trajectory_ids.unique():
        members = trajectory_ids == trajectory
        out[members] = torch.quantile(vds[members], quantile)
    return out


def gate_and_gamma(
    vds: Tensor, objective: Any, vds_threshold: Any, trajectory_ids: Tensor | None, pool: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gate [N] bool (strictly above the upper threshold) and gamma [N]."""
    adaptive = objective.schedule == "adaptive"
    if vds.numel() == 0:
        return vds > 0, vds
    if vds_threshold is not None:
        low, high = vds_threshold if adaptive else (None, vds_threshold)
    else:
        ids = trajectory_ids if objective.vds_scope == "trajectory" else None
        high = thresholds(vds, objective.vds_quantile, trajectory_ids=ids, pool=pool)
        low = thresholds(vds, objective.adaptive_quantile, trajectory_ids=ids, pool=pool) if adaptive else None
    gamma = torch.full_like(vds, objective.gamma)
    if adaptive:
        gamma = torch.where(vds > high, gamma, torch.where(vds > low, gamma / 2, torch.zeros_like(vds)))
    return vds > high, gamma


def _weighted(coefficient: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_n c_n KL_n over the rows that count: a term with coefficient 0 is absent, even where it is infinite."""
    rows = coefficient != 0
    return (coefficient[rows] * kl(log_p[rows], log_q[rows])).sum()


def vgs_from_logits(
    student: Tensor,
    student_text: Tensor,
    teacher: Tensor,
    teacher_text: Tensor,
    *,
    objective: Any,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    vds: Tensor | None = None,
    vds_threshold: Any = None,
    trajectory_ids: Tensor | None = None,
    vds_pool: Tensor | None = None,
) -> OracleOutput:
    """The objective on final logits [N, V]. ``vds_pool``: the scores of all ranks, for a quantile across ranks."""
    tokens, dtype = student.shape[0], student.dtype
    log_pi, log_px, log_qi, log_qx = (row.log_softmax(-1) for row in (student, student_text, teacher, teacher_text))
    log_qi, log_qx = log_qi.detach(), log_qx.detach()
    log_star = steered_target(log_px.detach() if objective.detach_prior else log_px, log_qi, log_qx)

    scores = kl(log_qi, log_qx) if vds is None else vds
    gate, gamma = gate_and_gamma(scores.double(), objective, vds_threshold, trajectory_ids, vds_pool)
    if token_weights is None:
        token_weights = student.new_full((tokens,), 1.0 / max(tokens, 1))
    step = token_weights.to(dtype) * objective.eta
    loss = (
        _weighted(step, log_pi, log_qi)
        + _weighted(step * gamma.to(dtype), log_pi, log_star)
        + _weighted(step * objective.lam * gate.to(dtype), log_px, log_qx)
    )
    with torch.no_grad():
        return OracleOutput(
            loss=loss,
            standard=kl(log_pi, log_qi),
            visual=kl(log_pi, log_star),
            language=kl(log_px, log_qx),
            vds=scores,
            gate=gate,
            gamma=gamma,
            entropy=-kl(log_pi, torch.zeros_like(log_pi)),
            student_vds=kl(log_pi, log_px),
            target_logps=None if target_ids is None else log_pi.gather(-1, target_ids[:, None]).squeeze(-1),
        )


def vgs_oracle(
    student_hidden: Tensor,
    student_text_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_text_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    objective: Any,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    **options: Any,
) -> OracleOutput:
    """The objective on hidden states and heads; same arguments as the fused loss, in the dtype of the inputs."""
    shared: dict[str, Any] = {"temperature": objective.temperature, "vocab_size": vocab_size}
    student = {"softcap": student_softcap, "logit_scale": student_logit_scale, **shared}
    teacher = {"softcap": teacher_softcap, "logit_scale": teacher_logit_scale, **shared}
    return vgs_from_logits(
        head_logits(student_hidden, student_weight, student_bias, **student),
        head_logits(student_text_hidden, student_weight, student_bias, **student),
        head_logits(teacher_hidden, teacher_weight, teacher_bias, **teacher),
        head_logits(teacher_text_hidden, teacher_weight, teacher_bias, **teacher),
        objective=objective,
        **options,
    )


@dataclass
class DivergenceOracleOutput:
    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None


def divergence_oracle(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Sequence[tuple[Any, ...]],
    *,
    student_bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    vocab_size: int | None = None,
) -> DivergenceOracleOutput:
    """KL(softmax(student) || softmax(sum_k c_k logits_k / temperature)), rows given as (c, hidden, weight[, bias])."""
    tokens = student_hidden.shape[0]
    student = head_logits(
        student_hidden,
        student_weight,
        student_bias,
        softcap=student_softcap,
        logit_scale=student_logit_scale,
        temperature=temperature,
        vocab_size=vocab_size,
    )
    with torch.no_grad():
        composed = torch.zeros_like(student)
        for coefficient, hidden, weight, *bias in target:
            row = head_logits(hidden, weight, *bias, temperature=temperature, vocab_size=vocab_size)
            composed = composed + coefficient * row
    log_p, log_q = student.log_softmax(-1), composed.log_softmax(-1)
    if token_weights is None:
        token_weights = student.new_full((tokens,), 1.0 / max(tokens, 1))
    with torch.no_grad():
        divergence = kl(log_p, log_q)
    return DivergenceOracleOutput(
        loss=_weighted(token_weights.to(student.dtype), log_p, log_q),
        divergence=divergence,
        entropy=-kl(log_p, torch.zeros_like(log_p)).detach(),
        target_logps=None if target_ids is None else log_p.detach().gather(-1, target_ids[:, None]).squeeze(-1),
    )
