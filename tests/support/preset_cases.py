"""Random tokens in all views of a student and a teacher, in float64, for formulas on dense logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgs.models.heads import Head

TOKENS, VOCABULARY, WIDTHS = 24, 40, (16, 20)
VIEWS = ("image", "text", "control", "privileged")


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


class Case:
    """Random hidden states and heads of a student and a teacher, in all views."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        spread = {"realistic": 3.0, "peaked": 30.0, "near": 3.0}[kind]
        student, teacher = (spread * normal(VOCABULARY, width) / math.sqrt(width) for width in WIDTHS)
        rows = {view: normal(TOKENS, WIDTHS[0]) for view in VIEWS}
        teacher_rows = {view: normal(TOKENS, WIDTHS[1]) for view in VIEWS}
        if kind == "near":  # the same logits but for a thousandth
            teacher, teacher_rows = student, {view: x + 1e-3 * normal(*x.shape) for view, x in rows.items()}
        self.student = Head(student.requires_grad_(), normal(VOCABULARY).requires_grad_(), 0.8, None)
        self.teacher = Head(teacher.detach().clone(), None if kind == "near" else normal(VOCABULARY), 1.2, None)
        if kind == "near":
            self.teacher = Head(self.teacher.weight, self.student.bias.detach().clone(), 0.8, None)
        self.rows = {view: x.requires_grad_() for view, x in rows.items()}
        self.teacher_rows = teacher_rows
        self.weights = torch.rand(TOKENS, generator=generator, dtype=torch.float64) / TOKENS
        self.ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)

    def logits(self, model: str, view: str) -> Tensor:
        head, rows = (self.student, self.rows) if model == "student" else (self.teacher, self.teacher_rows)
        found = (rows[view] @ head.weight.T + head.bias) * head.logit_scale
        return found if model == "student" else found.detach()

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {**self.rows, "weight": self.student.weight, "bias": self.student.bias}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True, allow_unused=True)
        return dict(zip(self.parameters, found, strict=True))
