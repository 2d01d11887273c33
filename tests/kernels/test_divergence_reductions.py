"""Per-token values with gradients: any upstream gradient, detached weights, finite differences."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergence_checks import STEERED, TEACHER, TINY, TRAINED, each, on_rows
from divergence_oracle import family_oracle
from problems import DEVICE, Problem, evaluate, float32_bars, make_problem, relative_error

from vgs_kernels import PolicyTerm, fused_linear_divergence

KINDS = {
    "reverse": {},
    "forward": {"divergence": "forward_kl", "clip": 0.05},
    "jsd": {"divergence": "jsd", "beta": 0.3, "temperature": 1.3, "temperature_squared": True},
    "sampled": {"divergence": "sampled_reverse_kl", "token_clip": 1.0},
    "teacher top-k": {"divergence": "jsd", "support": "teacher_top_k", "top_k": 6},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 6, "student_softcap": 15.0},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.01, "token_clip": 1.0},
}
UPSTREAM = torch.tensor([0.7, -2.0, 0.0, 1e-3, 40.0], dtype=torch.float64, device=DEVICE)
WEIGHTS = torch.tensor([0.5, 1.0, 3.0, -0.2, 0.0], dtype=torch.float64, device=DEVICE)


def upstream_gradients(function, problem: Problem, upstream: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    leaves = problem.leaves(TRAINED)
    loss = on_rows(function, STEERED)(*leaves.args(), **leaves.biases(), reduction="none", **options).loss
    assert loss.shape == (problem.tokens,)
    (upstream.to(loss.dtype) * loss).sum().backward()
    return {name: getattr(leaves, name).grad for name in TRAINED}


@pytest.mark.parametrize("workspace_bytes", [2**30, TINY])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_upstream_gradient(kind, weights, workspace_bytes):
    problem = make_problem(5, 257, bias=True, dtype=torch.float64)
    options = {"target_ids": problem.target_ids, "token_weights": weights, **KINDS[kind]}
    exact = upstream_gradients(family_oracle, problem, UPSTREAM, **options)
    ours = upstream_gradients(fused_linear_divergence, problem, UPSTREAM, workspace_bytes=workspace_bytes, **options)
    for name in TRAINED:
        assert relative_error(ours[name], exact[name]) < 1e-9, name


@pytest.mark.parametrize("kind", ["jsd", "student top-k"])
def test_any_upstream_gradient_in_triton(kind):
    pytest.importorskip("triton")
    problem = make_problem(5, 131, bias=True)
    options = {"target_ids": problem.target_ids, **KINDS[kind]}
    exact = upstream_gradients(family_oracle, problem.to(dtype=torch.float64), UPSTREAM, **options)
    ours = upstream_gradients(
        fused_linear_divergence, problem, UPSTREAM, workspace_bytes=TINY, backend="triton", **options
    )
    run, weighted = on_rows(family_oracle, STEERED), {**options, "token_weights": UPSTREAM}
    reference = evaluate(run, problem, dtype=torch.float64, requires_grad=TRAINED, **weighted)
    bars = float32_bars(problem, reference, run, **weighted)
    for name in TRAINED:
        assert relative_error(ours[name], exact[name]) < bars[name], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_upstream_gradients_are_not_rounded_to_16_bits(dtype):
    """They reach the gradient as the float32 numbers that they are."""
    problem = make_problem(5, 131, bias=True, dtype=dtype)
    exact = upstream_gradients(family_oracle, problem.to(dtype=torch.float64), UPSTREAM)
    plain, ours = (upstream_gradients(f, problem, UPSTREAM) for f in (family_oracle, fused_linear_divergence))
    for name in TRAINED:
        assert ours[name].dtype == dtype
        assert relative_error(ours[name], exact[name]) <= 2 * relative_error(plain[name], exact[name])


@each(KINDS, "jsd")
def test_none_and_sum_agree(backend, kind):
    """Weights given to the call, or multiplied with its values: one loss, one gradient."""
    problem = make_problem(5, 57, bias=True)
    options = {"target_ids": problem.target_ids, "backend": backend, **KINDS[kind]}
    weights = WEIGHTS.float()
    run = on_rows(fused_linear_divergence, TEACHER)
    total = evaluate(run, problem, requires_grad=TRAINED, token_weights=weights, **options)
    for given, outside in ((None, weights), (weights, torch.ones_like(weights)))[: 2 if backend == "torch" else 1]:
        leaves = problem.leaves(TRAINED)
        out = run(*leaves.args(), **leaves.biases(), reduction="none", token_weights=given, **options)
        torch.testing.assert_close(out.divergence, total.output.divergence, rtol=1e-5, atol=1e-6)
        loss = (outside * out.loss).sum()
        torch.testing.assert_close(loss, total.output.loss, rtol=1e-5, atol=1e-5)
        loss.backward()
        for name, gradient in total.gradients.items():
            assert relative_error(getattr(leaves, name).grad, gradient) < 1e-5, name


def test_default_weights_are_ones_of_values_and_a_mean_of_sums():
    problem = make_problem(5, 57)
    run = on_rows(fused_linear_divergence, TEACHER)
    values = run(*problem.args(), reduction="none", divergence="jsd").loss
    torch.testing.assert_close(values.mean(), run(*problem.args(), divergence="jsd").loss)


def test_weights_are_constants():
    """Weights that depend on parameters receive no gradient through the loss, inside or outside of the call."""
    problem = make_problem(5, 57)
    scores = WEIGHTS.float().clone().requires_grad_()
    hidden = problem.student_hidden.clone().requires_grad_()
    rows = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    args = (hidden, problem.student_weight, rows)
    fused_linear_divergence(*args, token_weights=scores * 2).loss.backward()
    assert scores.grad is None
    inside = hidden.grad.clone()
    hidden.grad = None
    ((scores * 2).detach() * fused_linear_divergence(*args, reduction="none").loss).sum().backward()
    assert relative_error(hidden.grad, inside) < 1e-5
    (scores * fused_linear_divergence(*args, reduction="none").loss).sum().backward()
    expected = fused_linear_divergence(*args).divergence
    torch.testing.assert_close(scores.grad, expected)  # a weight that is none of the call's is the caller's business


def test_values_through_other_functions():
    """Of relu(values - 0.5)^2, a maximum, a mean over trajectories: autograd's chain rule reaches the heads."""
    problem = make_problem(6, 57, bias=True, dtype=torch.float64)

    def outer(values):
        return torch.relu(values - values.detach().median()).square().sum() + values[:3].max() - values[3:].mean()

    gradients = []
    for function in (fused_linear_divergence, family_oracle):
        leaves = problem.leaves(TRAINED)
        run = on_rows(function, TEACHER)
        outer(run(*leaves.args(), **leaves.biases(), divergence="jsd", reduction="none").loss).backward()
        gradients.append([getattr(leaves, name).grad for name in TRAINED])
    for ours, exact in zip(*gradients, strict=True):
        assert relative_error(ours, exact) < 1e-9


def test_zero_upstream_of_an_infinite_token():
    """A token that is infinite and does not count leaves no NaN behind."""
    problem = make_problem(4, 57, bias=True)
    problem.student_bias[9] = -torch.inf
    run = on_rows(fused_linear_divergence, TEACHER)
    weights = torch.zeros(4, device=DEVICE)
    ours = evaluate(run, problem, requires_grad=TRAINED, divergence="forward_kl", token_weights=weights)
    assert ours.loss == 0
    assert all(not gradient.any() for gradient in ours.gradients.values())


def test_backward_twice():
    leaves = make_problem(5, 57, bias=True).leaves(TRAINED)
    run = on_rows(fused_linear_divergence, TEACHER)
    values = run(*leaves.args(), **leaves.biases(), divergence="jsd", reduction="none").loss
    values.sum().backward(retain_graph=True)
    first = {name: getattr(leaves, name).grad.clone() for name in TRAINED}
    (2 * values).sum().backward()
    for name in TRAINED:
        torch.testing.assert_close(getattr(leaves, name).grad, 3 * first[name])
    with pytest.raises(RuntimeError, match="second time"):
        values.sum().backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sampled"])  # whose gradient is no derivative
def test_gradcheck(kind, reduction):
    problem = make_problem(3, 11, 3, 4, bias=True, dtype=torch.float64)
    options = {**KINDS[kind], "student_logit_scale": 0.9}
    if "top_k" in options:
        options["top_k"] = 4

    def loss(hidden, weight, bias):
        current = replace(problem, student_hidden=hidden, student_weight=weight, student_bias=bias)
        run = on_rows(fused_linear_divergence, {"t": 1.5, "w": -0.5})
        return run(*current.args(), **current.biases(), reduction=reduction, **options).loss

    leaves = [getattr(problem, name).clone().requires_grad_() for name in TRAINED]
    assert torch.autograd.gradcheck(loss, leaves)


def test_gradcheck_of_the_policy():
    problem = make_problem(3, 11, 3, 4, dtype=torch.float64)
    rows = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    old = fused_linear_divergence(
        problem.student_hidden, problem.student_weight, rows, target_ids=problem.target_ids
    ).target_logps
    shift = torch.tensor([0.5, -0.1, -0.4], dtype=torch.float64, device=DEVICE)
    advantages = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64, device=DEVICE)

    def loss(hidden, weight):
        policy = PolicyTerm(advantages, torch.ones_like(advantages), old + shift)
        return fused_linear_divergence(hidden, weight, rows, target_ids=problem.target_ids, policy=policy).loss

    leaves = [x.clone().requires_grad_() for x in (problem.student_hidden, problem.student_weight)]
    assert torch.autograd.gradcheck(loss, leaves)


def test_unreduced_values_are_differentiable_once():
    """A second derivative is refused: it would be zero without a word."""
    student = torch.randn(3, 8, requires_grad=True)
    head = torch.randn(11, 8)
    out = fused_linear_divergence(student, head, [(1.0, torch.randn(3, 8), head)], reduction="none")
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(out.loss.sum(), student, create_graph=True)
