"""The VGS objective from its definition (``vgs_kernels.reference``), called as the package's own functions are.

Everything runs in the dtype of the logits: float64 as the oracle, float32 or a 16-bit projection as the "plain PyTorch"
to compare with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vgs_kernels import Divergence
from vgs_kernels.reference import (
    divergence_reference,
    gate_and_gamma,
    kl_divergence,
    log_distributions,
    steered_target,
    vgs_reference,
)

__all__ = [
    "divergence_oracle",
    "gate_and_gamma",
    "head_logits",
    "kl",
    "steered_target",
    "vgs_from_logits",
    "vgs_oracle",
]
kl = kl_divergence


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
        logits = torch.where(logits > -math.inf, softcap * torch.tanh(logits / softcap), logits)
    return logits / temperature


def vgs_from_logits(
    student: Tensor, student_text: Tensor, teacher: Tensor, teacher_text: Tensor, *, objective: Any, **options: Any
) -> SimpleNamespace:
    """The objective on final logits [N, V], whose temperature is 1; options of ``vgs_reference``."""
    names = ("gamma", "lam", "eta", "vds_quantile", "adaptive_quantile", "schedule", "detach_prior", "vds_scope")
    setting = SimpleNamespace(**{name: getattr(objective, name) for name in names}, temperature=1.0)
    return SimpleNamespace(**vgs_reference(student, student_text, teacher, teacher_text, setting, **options))


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
) -> SimpleNamespace:
    """The objective on hidden states and heads; same arguments as the fused loss, in the dtype of the inputs."""
    student = {"softcap": student_softcap, "logit_scale": student_logit_scale, "vocab_size": vocab_size}
    teacher = {"softcap": teacher_softcap, "logit_scale": teacher_logit_scale, "vocab_size": vocab_size}
    out = vgs_reference(
        head_logits(student_hidden, student_weight, student_bias, **student),
        head_logits(student_text_hidden, student_weight, student_bias, **student),
        head_logits(teacher_hidden, teacher_weight, teacher_bias, **teacher),
        head_logits(teacher_text_hidden, teacher_weight, teacher_bias, **teacher),
        objective,
        **options,
    )
    return SimpleNamespace(**out)


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
) -> SimpleNamespace:
    """KL(softmax(student) || softmax(sum_k c_k logits_k / temperature)), rows given as (c, hidden, weight[, bias])."""
    shared = {"softcap": student_softcap, "logit_scale": student_logit_scale, "vocab_size": vocab_size}
    student = head_logits(student_hidden, student_weight, student_bias, **shared)
    with torch.no_grad():
        rows = [(c, head_logits(hidden, weight, *bias, vocab_size=vocab_size)) for c, hidden, weight, *bias in target]
    settings = Divergence(temperature=temperature)
    values, log_p = divergence_reference(student, rows, settings), log_distributions(student, rows, settings)[0]
    if token_weights is None:
        token_weights = student.new_full((len(student),), 1.0 / max(len(student), 1))
    counted = token_weights != 0
    return SimpleNamespace(
        loss=(token_weights[counted].to(student.dtype) * values[counted]).sum(),
        divergence=values.detach(),
        entropy=-kl(log_p, torch.zeros_like(log_p)).detach(),
        target_logps=None if target_ids is None else log_p.detach().gather(-1, target_ids[:, None]).squeeze(-1),
    )
