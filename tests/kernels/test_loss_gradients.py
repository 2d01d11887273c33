"""Gradients against the float64 oracle, and how they flow: frozen inputs, tied weights, strides, repeated backwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from covering import on_backends
from loss_checks import GAPS, SIZES, strided
from oracle import vgs_oracle
from problems import (
    TRAINABLE,
    assert_gradients_close,
    evaluate,
    float32_bars,
    make_problem,
)

from vgs_kernels import FusedLinearVGSLoss, VGSObjective, fused_linear_vgs_loss

OBJECTIVES = [
    pytest.param(VGSObjective(lam=0.1), id="vgs"),
    pytest.param(VGSObjective(lam=0.1, detach_prior=False), id="live-prior"),
    pytest.param(VGSObjective(gamma=0.0, lam=0.0), id="plain"),
]


@on_backends(size=SIZES, objective=OBJECTIVES, gap=GAPS)
def test_float32_gradients(backend, size, objective, gap):
    tokens, vocab = size[backend]
    problem = make_problem(tokens, vocab, gap=gap, bias=True)
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, objective=objective)
    ours = evaluate(fused_linear_vgs_loss, problem, objective=objective, backend=backend)
    assert_gradients_close(ours, exact, rtol=float32_bars(problem, exact, vgs_oracle, objective=objective))


@on_backends(hidden=[True, False], head=[True, False], objective=OBJECTIVES)
def test_gradients_only_where_required(backend, hidden, head, objective):
    problem = make_problem(5, 57, bias=True)
    required = list(TRAINABLE[:2]) * hidden + list(TRAINABLE[2:]) * head
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, requires_grad=required, objective=objective)
    ours = evaluate(fused_linear_vgs_loss, problem, requires_grad=required, objective=objective, backend=backend)
    assert ours.output.loss.requires_grad == bool(required)
    assert_gradients_close(ours, exact, rtol=float32_bars(problem, exact, vgs_oracle, objective=objective))
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TRAINABLE)
def test_each_gradient_alone(backend, name):
    problem = make_problem(5, 57, bias=True)
    objective = VGSObjective(lam=0.1)
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, requires_grad=[name], objective=objective)
    ours = evaluate(fused_linear_vgs_loss, problem, requires_grad=[name], objective=objective, backend=backend)
    assert_gradients_close(ours, exact, rtol=float32_bars(problem, exact, vgs_oracle, objective=objective))


def test_teacher_inputs_that_require_grad_receive_none():
    problem = make_problem(5, 57).leaves(("student_hidden", "teacher_hidden", "teacher_text_hidden", "teacher_weight"))
    fused_linear_vgs_loss(*problem.args()).loss.backward()
    assert problem.student_hidden.grad is not None
    assert all(tensor.grad is None for tensor in problem.args()[3:])


@pytest.mark.parametrize("lam", [0.0, 0.01])
def test_no_tokens(backend, lam):
    """Loss 0, still connected to every input that requires grad."""
    problem = make_problem(0, 57, bias=True)
    ours = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(lam=lam), backend=backend)
    assert ours.loss == 0
    for name, gradient in ours.gradients.items():
        assert gradient is not None, name
        assert not gradient.any(), name
        assert gradient.shape == getattr(problem, name).shape


def test_one_token_is_never_gated(backend):
    """A single token is its own quantile, and the gate is strict: the text-only rows receive zeros."""
    problem = make_problem(1, 57)
    ours = evaluate(fused_linear_vgs_loss, problem, backend=backend)
    assert not ours.output.gate.item()
    assert not ours.gradients["student_text_hidden"].any()
    assert ours.gradients["student_hidden"].any()


def test_head_used_twice():
    """A head shared by two calls receives the sum of both gradients, and so does one tied to another use."""
    first, second = make_problem(5, 57, seed=1), make_problem(7, 57, seed=2)
    second = replace(second, student_weight=first.student_weight)
    parts = [evaluate(fused_linear_vgs_loss, p).gradients["student_weight"] for p in (first, second)]
    weight = first.student_weight.clone().requires_grad_()
    total = sum(fused_linear_vgs_loss(*replace(p, student_weight=weight).args()).loss for p in (first, second))
    (total + weight.square().sum()).backward()
    torch.testing.assert_close(weight.grad, parts[0] + parts[1] + 2 * first.student_weight)


def test_teacher_sharing_the_student_head():
    """Self-distillation: one tensor is both heads; it receives the student's gradient alone."""
    problem = make_problem(5, 57)
    shared = replace(
        problem,
        teacher_weight=problem.student_weight.clone(),
        teacher_hidden=problem.student_hidden * 1.1,
        teacher_text_hidden=problem.student_text_hidden * 1.2,
    )
    expected = evaluate(fused_linear_vgs_loss, shared).gradients["student_weight"]
    weight = problem.student_weight.clone().requires_grad_()
    fused_linear_vgs_loss(*replace(shared, student_weight=weight, teacher_weight=weight).args()).loss.backward()
    torch.testing.assert_close(weight.grad, expected)


def test_gradients_are_no_part_of_a_graph():
    """Also where the backward scales them in place: they can be converted, and stepped along."""
    problem = make_problem(5, 57).leaves()
    leaves = [problem.student_hidden, problem.student_text_hidden, problem.student_weight]
    gradients = torch.autograd.grad(fused_linear_vgs_loss(*problem.args()).loss, leaves)
    expected = evaluate(fused_linear_vgs_loss, problem).gradients
    for name, gradient in zip(TRAINABLE, gradients, strict=False):
        assert not gradient.requires_grad and gradient.grad_fn is None
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "restride",
    [
        pytest.param(lambda tensor: tensor.mT.contiguous().mT if tensor.ndim == 2 else tensor, id="transposed"),
        pytest.param(strided, id="strided"),
    ],
)
def test_non_contiguous_inputs(backend, restride):
    problem = make_problem(5, 57, bias=True)
    names = [*TRAINABLE, "teacher_hidden", "teacher_text_hidden", "teacher_weight", "teacher_bias"]
    views = replace(problem, **{name: restride(getattr(problem, name)) for name in names})
    assert not views.student_weight.is_contiguous()
    assert not views.student_hidden.is_contiguous()
    expected = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(lam=0.1), backend=backend)
    # leaves() would compact a strided view, so the gradient is taken with respect to the contiguous original
    leaves = problem.leaves()
    inputs = [restride(tensor) for tensor in leaves.args()]
    biases = {name: restride(tensor) for name, tensor in leaves.biases().items()}
    out = fused_linear_vgs_loss(*inputs, objective=VGSObjective(lam=0.1), backend=backend, **biases)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.output.loss)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(getattr(leaves, name).grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("objective", "names"),
    [
        pytest.param(VGSObjective(lam=0.5, detach_prior=False), TRAINABLE, id="live-prior"),
        # a detached prior is a constant to the gradient but not to a finite difference: the multimodal rows only
        pytest.param(VGSObjective(lam=0.5), TRAINABLE[:1], id="detached-prior"),
        pytest.param(VGSObjective(gamma=0.0, lam=0.5, temperature=1.5), TRAINABLE, id="no-prior"),
    ],
)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_gradcheck_float64(objective, names, softcap):
    problem = make_problem(4, 11, 3, 4, bias=True, dtype=torch.float64)
    leaves = problem.leaves(names)

    def loss(*trainable: torch.Tensor) -> torch.Tensor:
        current = replace(leaves, **dict(zip(names, trainable, strict=True)))
        options = {"student_softcap": softcap, "student_logit_scale": 0.9, "teacher_softcap": softcap}
        return fused_linear_vgs_loss(*current.args(), objective=objective, **options, **current.biases()).loss

    assert torch.autograd.gradcheck(loss, [getattr(leaves, name) for name in names])


def test_scaled_loss_scales_gradients(backend):
    problem = make_problem(5, 57, bias=True)
    options = {"objective": VGSObjective(lam=0.1), "backend": backend}
    once = evaluate(fused_linear_vgs_loss, problem, **options)
    thrice = evaluate(fused_linear_vgs_loss, problem, grad_output=-3.0, **options)
    for name, gradient in once.gradients.items():
        torch.testing.assert_close(thrice.gradients[name], -3 * gradient)


def test_backward_twice(backend):
    """With retain_graph a second backward adds the same gradient; without, it raises instead of returning garbage."""
    leaves = make_problem(5, 57, bias=True).leaves()
    loss = fused_linear_vgs_loss(*leaves.args(), backend=backend, **leaves.biases()).loss
    loss.backward(retain_graph=True)
    first = {name: getattr(leaves, name).grad.clone() for name in TRAINABLE}
    (2 * loss).backward()
    for name, gradient in first.items():
        torch.testing.assert_close(getattr(leaves, name).grad, 3 * gradient)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_raises():
    """A gradient penalty must not be dropped silently: either of the two backwards says that it cannot be."""

    def gradient_penalty():
        leaves = make_problem(5, 57).leaves()
        loss = fused_linear_vgs_loss(*leaves.args()).loss
        (gradient,) = torch.autograd.grad(loss, leaves.student_hidden, create_graph=True)
        (gradient.square().sum() + leaves.student_hidden.sum()).backward()

    with pytest.raises(RuntimeError, match=r"(?i)differentiable once|twice|double"):
        gradient_penalty()


def test_no_grad_mode_returns_the_same_values():
    problem = make_problem(5, 57)
    expected = evaluate(fused_linear_vgs_loss, problem)
    with torch.no_grad():
        out = fused_linear_vgs_loss(*problem.leaves().args())
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, expected.loss)


def test_module_form(backend):
    problem = make_problem(5, 57, bias=True)
    objective = VGSObjective(gamma=1.0, lam=0.1)
    module = FusedLinearVGSLoss(objective=objective, backend=backend)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    expected = evaluate(fused_linear_vgs_loss, problem, objective=objective, backend=backend)
    ours = evaluate(module, problem)
    torch.testing.assert_close(ours.loss, expected.loss)
    assert_gradients_close(ours, expected, rtol=1e-7)
