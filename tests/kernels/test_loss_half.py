"""bfloat16 and float16 against the float64 oracle on the same rounded inputs.

The bar is twice the error of the same formula as trainers write it: 16-bit logits from the head, a float32 loss on
them, autograd through both. The inputs are the same 16-bit numbers, so that only the arithmetic differs.
"""

from __future__ import annotations

import pytest
import torch
from oracle import vgs_from_logits, vgs_oracle
from problems import FAR, NEAR, TERMS, assert_gradients_close, evaluate, make_problem, relative_error, value_floor

from vgs_kernels import VGSObjective, fused_linear_vgs_loss, vgs_loss

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [("torch", 65, 1000), ("loops", 65, 1000), ("triton", 7, 257)]


@pytest.mark.parametrize("gap", [pytest.param(FAR, id="far"), pytest.param(NEAR, id="near")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "tokens", "vocab"), SHAPES)
def test_error_against_plain_pytorch(backend, tokens, vocab, dtype, gap):
    problem = make_problem(tokens, vocab, gap=gap, bias=True, dtype=dtype)
    options = {"objective": VGSObjective(lam=0.1), "target_ids": problem.target_ids}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    # the gate of the plain version may differ on a token or two: give it the exact one, so that the bar is not inflated
    given = {**options, "vds": exact.output.vds}
    eager = evaluate(vgs_oracle, problem, **given)
    ours = evaluate(fused_linear_vgs_loss, problem, backend=backend, **options)

    bars = {name: 2 * relative_error(g, exact.gradients[name]) for name, g in eager.gradients.items()}
    assert_gradients_close(ours, exact, rtol=bars)
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == dtype, name
    floor = value_floor(problem) / exact.loss.item()
    for name in set(TERMS) - {"vds"}:
        expected = getattr(exact.output, name)
        bar = 2 * relative_error(getattr(eager.output, name), expected)
        assert relative_error(getattr(ours.output, name), expected) <= max(bar, floor), name
    assert relative_error(ours.output.vds, exact.output.vds) < 1e-4  # float32 logits of the exact 16-bit products
    assert relative_error(ours.loss, exact.loss) <= max(2 * relative_error(eager.loss, exact.loss), floor)


@pytest.mark.parametrize("gap", [pytest.param(FAR, id="far"), pytest.param(NEAR, id="near")])
def test_values_do_not_pass_through_16_bit_logits(backend, gap):
    """Far better than the bar: terms of bfloat16 inputs are as exact as those of float32 inputs."""
    problem = make_problem(7, 257, gap=gap, dtype=torch.bfloat16)
    options = {"objective": VGSObjective(), "target_ids": problem.target_ids}
    exact = vgs_oracle(*problem.to(dtype=torch.float64).args(), **options)
    ours = fused_linear_vgs_loss(*problem.args(), backend=backend, **options)
    for name in TERMS:
        torch.testing.assert_close(
            getattr(ours, name).double(), getattr(exact, name), rtol=1e-5, atol=value_floor(problem), msg=name
        )


def test_head_gradient_of_many_chunks_accumulates_in_float32():
    """Many small chunks must not lose the small summands of lambda in 16-bit partial sums."""
    problem = make_problem(129, 257, dtype=torch.bfloat16)
    options = {"objective": VGSObjective(gamma=0.0, lam=0.01)}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    whole = evaluate(fused_linear_vgs_loss, problem, **options)
    chunked = evaluate(fused_linear_vgs_loss, problem, workspace_bytes=2**14, **options)
    errors = [
        relative_error(e.gradients["student_weight"], exact.gradients["student_weight"]) for e in (whole, chunked)
    ]
    assert errors[0] < 4e-3
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_in_16_bit(backend, dtype):
    """Given 16-bit logits, the loss is exact on them, and their gradient has their dtype."""
    problem = make_problem(7, 257)
    rows = [problem.student_hidden @ problem.student_weight.T, problem.student_text_hidden @ problem.student_weight.T]
    rows += [problem.teacher_hidden @ problem.teacher_weight.T, problem.teacher_text_hidden @ problem.teacher_weight.T]
    rows = [row.to(dtype) for row in rows]
    objective = VGSObjective(lam=0.1)
    exact_rows = [row.double().requires_grad_(i < 2) for i, row in enumerate(rows)]
    exact = vgs_from_logits(*exact_rows, objective=objective)
    exact.loss.backward()
    leaves = [row.clone().requires_grad_(i < 2) for i, row in enumerate(rows)]
    ours = vgs_loss(*leaves, objective=objective, backend=backend)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=value_floor(problem))
    for leaf, reference in zip(leaves[:2], exact_rows[:2], strict=True):
        assert leaf.grad.dtype == dtype
        assert relative_error(leaf.grad, reference.grad) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_scales_16_bit_gradients_with_an_unrounded_factor(backend, dtype):
    problem = make_problem(7, 257)
    rows = [problem.student_hidden @ problem.student_weight.T, problem.student_text_hidden @ problem.student_weight.T]
    rows += [problem.teacher_hidden @ problem.teacher_weight.T, problem.teacher_text_hidden @ problem.teacher_weight.T]
    gradients = []
    for factor in (1.0, 1 / 3):
        leaves = [row.to(dtype).requires_grad_(i < 2) for i, row in enumerate(rows)]
        options = {
            "objective": VGSObjective(lam=0.1, eta=1.0),
            "token_weights": rows[0].new_ones(7),
            "backend": backend,
        }
        (factor * vgs_loss(*leaves, **options).loss).backward()
        gradients.append([leaf.grad for leaf in leaves[:2]])
    for whole, third in zip(*gradients, strict=True):
        assert whole.any() and torch.equal(third, (whole.float() * (1 / 3)).to(dtype))
