"""Problems of real sizes on the device, and their comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import problems
import pytest
import torch
from problems import DEVICE, INPUTS, TERMS, Evaluation, Problem, make_problem, value_floor
from torch import Tensor

from vgs_kernels import VGSObjective

TOKENS, ODD_VOCAB, VOCAB = 300, 32_003, 151_936
#: Distinct rows, repeated: prime, so that an offset that wraps at a power of two meets another row. The oracle of all
#: tokens follows from that of these few.
PERIOD = 251
LIVE = VGSObjective(lam=0.1, detach_prior=False)
OBJECTIVES = {
    "constant": VGSObjective(lam=0.1),
    "adaptive": VGSObjective(lam=0.1, schedule="adaptive"),
    "live prior": LIVE,
}


def realistic(tokens: int, vocab: int, student_dim: int, teacher_dim: int, **options: Any) -> Problem:
    """A problem of the CPU tests' hidden sizes, turned into larger ones by isometries: in so many dimensions of its own
    every row would put all its mass on one token. The bisection, nearly all of the time, runs on the device.
    """
    bisect = problems._peaked

    def on_device(*tensors: Tensor) -> Tensor:
        return bisect(*(tensor.to(DEVICE) for tensor in tensors)).cpu()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problems, "_peaked", on_device)
        problem = make_problem(tokens, vocab, dtype=torch.float64, **options)
    generator = torch.Generator().manual_seed(0)
    lifted = {}
    for model, size in (("student", student_dim), ("teacher", teacher_dim)):
        small = getattr(problem, f"{model}_weight").shape[1]
        basis = torch.linalg.qr(torch.randn(size, small, generator=generator, dtype=torch.float64))[0].to(DEVICE)
        lifted |= {name: getattr(problem, name) @ basis.T for name in INPUTS if name.startswith(model)}
    return replace(problem, **lifted)


def dense(problem: Problem) -> list[Tensor]:
    """The four rows of logits."""
    student, teacher = problem.student_weight.T, problem.teacher_weight.T
    rows = [problem.student_hidden @ student, problem.student_text_hidden @ student]
    return [*rows, problem.teacher_hidden @ teacher, problem.teacher_text_hidden @ teacher]


def logit_floor(problem: Problem, temperature: float = 1.0) -> float:
    """``value_floor`` at hidden sizes where a float32 dot product is off by more than half an ulp: four times the
    largest error of plain products."""
    exact, plain = dense(problem.to(dtype=torch.float64)), dense(problem.to(dtype=torch.float32))
    error = max((ours - reference).abs().max().item() for ours, reference in zip(plain, exact, strict=True))
    return max(value_floor(problem, temperature), 4 * error / min(temperature, 1.0))


def repeated(problem: Problem, tokens: int) -> Problem:
    """As many tokens as asked for, the problem's over and over."""
    return problem.rows(torch.arange(tokens, device=DEVICE) % problem.tokens)


def assert_bitwise(actual: Evaluation, expected: Evaluation) -> None:
    assert torch.equal(actual.loss, expected.loss)
    for name in (*TERMS, "gate"):
        assert torch.equal(getattr(actual.output, name), getattr(expected.output, name)), name
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name


def rising_weights(tokens: int) -> Tensor:
    """A different weight for every token; their sum is 1."""
    return torch.linspace(0.5, 1.5, tokens, device=DEVICE) / tokens
