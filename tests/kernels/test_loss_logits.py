"""``vgs_loss``: the same objective for callers that hold logits, where each row can be masked on its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from covering import on_backends
from oracle import vgs_from_logits
from problems import DEVICE, assert_terms_close, make_problem, relative_error, value_floor

from vgs_kernels import VGSObjective, vgs_loss

ROWS = ("student", "student_text", "teacher", "teacher_text")


def logits(tokens: int = 7, vocab: int = 131, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    problem = make_problem(tokens, vocab)
    student, teacher = problem.student_weight.T, problem.teacher_weight.T
    rows = (
        problem.student_hidden @ student,
        problem.student_text_hidden @ student,
        problem.teacher_hidden @ teacher,
        problem.teacher_text_hidden @ teacher,
    )
    return [row.to(dtype) for row in rows]


def through(function, rows: list[torch.Tensor], temperature: float = 1.0, **options) -> tuple[Any, list[torch.Tensor]]:
    """Output and gradients of the two student rows (zeros for none)."""
    leaves = [row.clone().requires_grad_(i < 2) for i, row in enumerate(rows)]
    out = function(*(leaf / temperature if temperature != 1 else leaf for leaf in leaves), **options)
    if out.loss.isfinite():
        out.loss.backward()
    return out, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves[:2]]


def compare(rows: list[torch.Tensor], objective: VGSObjective, *, backend: str, **options) -> None:
    """Values and gradients against the oracle, as close as the dtype allows (``float32_bars`` tells why)."""
    double = rows[0].dtype == torch.float64
    floor = 1e-11 if double else value_floor(make_problem(7, 131), objective.temperature)
    rtol = 1e-9 if double else 1e-5
    options["objective"] = objective
    exact, wanted = through(vgs_from_logits, [row.double() for row in rows], objective.temperature, **options)
    _, plain = through(vgs_from_logits, rows, objective.temperature, **options)
    ours, gradients = through(vgs_loss, rows, backend=backend, **options)
    assert_terms_close(ours, exact, rtol=rtol, floor=floor)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=rtol, atol=10 * floor)
    for name, gradient, reference, eager in zip(ROWS, gradients, wanted, plain, strict=False):
        assert relative_error(gradient, reference) <= max(rtol, 2 * relative_error(eager, reference)), name


OBJECTIVES = {
    "vgs": VGSObjective(lam=0.5),
    "live prior": VGSObjective(lam=0.5, detach_prior=False),
    "adaptive": VGSObjective(lam=0.5, schedule="adaptive"),
    "plain": VGSObjective(gamma=0.0, lam=0.0),
    "temperature": VGSObjective(lam=0.5, temperature=0.7, eta=0.4),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_in_float64(name):
    compare(logits(17, 257, torch.float64), OBJECTIVES[name], backend="torch")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_in_float32(backend, name):
    compare(logits(), OBJECTIVES[name], backend=backend, target_ids=torch.arange(7, device=DEVICE))


MASKED = [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (2, 3), (1, 3), (0, 1, 2), (0, 1, 2, 3)]


@on_backends(masked=MASKED, name=["vgs", "plain", "live prior"])
def test_rows_masked_separately(backend, masked, name):
    """-inf in any subset of the rows: infinite where a KL is, never NaN, and with the oracle's gradients where finite.

    The scores are given: a quantile of infinite scores is not defined.
    """
    rows = logits()
    for row in masked:
        rows[row][:, 5:9] = -math.inf
    compare(rows, OBJECTIVES[name], backend=backend, vds=torch.arange(7.0, device=DEVICE))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("masked", [1, 3])
def test_infinite_term_with_a_zero_coefficient(backend, masked, live):
    """An infinite visual or language term of a token that is steered by gamma 0 and not gated, or has weight 0."""
    rows = logits()
    rows[masked][2, 5:9] = -math.inf
    vds = torch.arange(7.0, device=DEVICE)
    adaptive = VGSObjective(lam=0.5, schedule="adaptive", detach_prior=not live)
    compare(rows, adaptive, backend=backend, vds=vds)
    weights = torch.ones(7, device=DEVICE)
    weights[2] = 0
    constant = VGSObjective(lam=0.5, detach_prior=not live)
    compare(rows, constant, backend=backend, vds=vds, vds_threshold=-1.0, token_weights=weights)


def test_padded_vocabulary(backend):
    rows = logits()
    wide = [torch.nn.functional.pad(row, (0, 3 + i), value=50.0) for i, row in enumerate(rows)]
    wide[1], wide[3] = wide[0].clone(), wide[2].clone()  # both views of one model have the same columns
    wide[1][:, :131], wide[3][:, :131] = rows[1], rows[3]
    expected = vgs_loss(*rows, backend=backend)
    leaf = wide[0].requires_grad_()
    ours = vgs_loss(leaf, *wide[1:], vocab_size=131, backend=backend)
    torch.testing.assert_close(ours.loss, expected.loss)
    ours.loss.backward()
    assert leaf.grad.shape == wide[0].shape
    assert not leaf.grad[:, 131:].any()


def test_non_contiguous_logits(backend):
    rows = logits()
    expected = vgs_loss(*rows, backend=backend)
    ours = vgs_loss(*(row.mT.contiguous().mT for row in rows), backend=backend)
    torch.testing.assert_close(ours.loss, expected.loss)


def test_no_tokens(backend):
    leaves = [row.requires_grad_(i < 2) for i, row in enumerate(logits(0))]
    out = vgs_loss(*leaves, backend=backend)
    out.loss.backward()
    assert out.loss == 0
    assert leaves[0].grad.shape == leaves[1].grad.shape == (0, 131)


def test_inputs_are_left_alone(backend):
    rows = logits()
    copies = [row.clone() for row in rows]
    leaf = rows[0].requires_grad_()
    vgs_loss(leaf, *rows[1:], backend=backend).loss.backward()
    assert all(torch.equal(row, copy) for row, copy in zip(rows, copies, strict=True))
