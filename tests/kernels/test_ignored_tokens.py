"""Ignored and weightless tokens in every form of call: as if they were not there, whatever their states hold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_checks import each, on_rows
from problems import DEVICE, TRAINABLE, evaluate, make_problem

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

NOBODY, LEFT_OUT, KEPT = -100, [0, 3, 4, 8], [1, 2, 5, 6, 7]
STATES = ("student_hidden", "student_text_hidden", "teacher_hidden", "teacher_text_hidden")
TRAJECTORIES = torch.tensor([3, 0, 0, 3, 5, 1, 1, 1, 3], device=DEVICE)  # 3 and 5 have ignored tokens alone
OBJECTIVES = {
    "gated": VGSObjective(lam=0.5),
    "adaptive": VGSObjective(lam=0.5, schedule="adaptive", detach_prior=False),
    "trajectories": VGSObjective(lam=0.5, vds_scope="trajectory"),
    "adaptive trajectories": VGSObjective(lam=0.5, vds_scope="trajectory", schedule="adaptive"),
    "folded": VGSObjective(lam=0.0),
}
DIVERGENCES: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward, clip": {"divergence": "forward_kl", "clip": 0.05},
    "jsd": {"divergence": "jsd"},
    "sampled": {"divergence": "sampled_reverse_kl"},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 5},
    "teacher top-k": {"support": "teacher_top_k", "top_k": 5},
    "plausible": {"divergence": "jsd", "support": "plausible", "plausibility": 0.1},
}
COMPOSED = {"t": 1.0, "a": 0.6, "w": -0.6}


def to_dtype(backend: str) -> torch.dtype:
    return torch.float64 if backend == "torch" else torch.float32


def spoilt(problem, value: float = math.nan):
    """The problem with states of that value, and no id, where a token is left out."""
    states = {name: getattr(problem, name).clone() for name in STATES}
    for x in states.values():
        x[LEFT_OUT] = value
    ids = problem.target_ids.clone()
    ids[LEFT_OUT] = NOBODY
    return replace(problem, **states, target_ids=ids)


def assert_same(ours, expected, terms) -> None:
    """Loss, terms and gradients of the others; nothing at all of those left out."""
    close = {"rtol": 1e-9, "atol": 1e-12} if expected.loss.dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    torch.testing.assert_close(ours.loss, expected.loss, **close)
    for name in terms:
        values, others = getattr(ours.output, name), getattr(expected.output, name)
        assert (values is None) == (others is None), name
        if values is not None:
            torch.testing.assert_close(values[KEPT], others, **close, msg=lambda m, n=name: f"{n}: {m}")
            assert not values[LEFT_OUT].any(), name
    for name, gradient in expected.gradients.items():
        got = ours.gradients[name]
        if gradient is None:
            assert got is None
            continue
        if "hidden" in name:
            assert not got[LEFT_OUT].any(), name
            got = got[KEPT]
        torch.testing.assert_close(got, gradient, **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reduction", [None, "none"])
@each(OBJECTIVES, "adaptive trajectories", name="name")
def test_the_vgs_loss(backend, name, reduction):
    """In every scope and schedule, with the mean of those that count and with gradients of their own."""
    problem = make_problem(9, 57, bias=True, dtype=to_dtype(backend))
    upstream = torch.linspace(-1, 2, 9, device=DEVICE, dtype=problem.student_hidden.dtype)
    trajectories = OBJECTIVES[name].vds_scope == "trajectory"

    def run(problem, rows):
        def function(*args, **options):
            out = fused_linear_vgs_loss(*args, **options)
            return replace(out, loss=(upstream[rows] * out.loss).sum()) if reduction == "none" else out

        options = {"trajectory_ids": TRAJECTORIES[rows]} if trajectories else {}
        options |= {"return_terms": name != "folded", "reduction": reduction, "backend": backend}
        return evaluate(function, problem, objective=OBJECTIVES[name], target_ids=problem.target_ids, **options)

    terms = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds", "target_logps")
    assert_same(run(spoilt(problem), slice(None)), run(problem.rows(KEPT), KEPT), terms)


@each(["vgs", "divergence"], "vgs", name="function")
@pytest.mark.parametrize("old", [False, True])
def test_a_policy_term(backend, function, old):
    problem = make_problem(9, 57, bias=True, dtype=to_dtype(backend))
    numbers = torch.linspace(-1, 2, 9, device=DEVICE, dtype=problem.student_hidden.dtype)

    def run(problem, rows):
        policy = PolicyTerm(numbers[rows], numbers[rows].cos(), numbers[rows] - 3 if old else None)
        shared = {"policy": policy, "target_ids": problem.target_ids, "backend": backend}
        if function == "vgs":
            return evaluate(fused_linear_vgs_loss, problem, objective=OBJECTIVES["gated"], **shared)
        names = [name for name in TRAINABLE if "text" not in name]
        return evaluate(on_rows(fused_linear_divergence, COMPOSED), problem, requires_grad=names, **shared)

    ours = run(spoilt(problem, math.inf), slice(None))
    assert_same(ours, run(problem.rows(KEPT), KEPT), ("entropy", "target_logps", "policy"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each(DIVERGENCES, "student top-k", name="name")
def test_divergences(backend, name, reduction):
    problem = make_problem(9, 57, bias=True, dtype=to_dtype(backend))
    upstream = torch.linspace(-1, 2, 9, device=DEVICE, dtype=problem.student_hidden.dtype)
    names = [name for name in TRAINABLE if "text" not in name]

    def run(problem, rows):
        def function(*args, **options):
            out = fused_linear_divergence(*args, **options)
            return replace(out, loss=(upstream[rows] * out.loss).sum()) if reduction == "none" else out

        options = {"reduction": reduction, "target_ids": problem.target_ids, "backend": backend, **DIVERGENCES[name]}
        return evaluate(on_rows(function, COMPOSED), problem, requires_grad=names, **options)

    ours = run(spoilt(problem), slice(None))
    assert_same(ours, run(problem.rows(KEPT), KEPT), ("divergence", "entropy", "target_logps"))


@each([*DIVERGENCES, "vgs"], "sampled", "vgs", name="name")
def test_logits(backend, name):
    """Rows of logits that hold anything; weights of 0 say so as well as ids do."""
    torch.manual_seed(0)
    four = torch.randn(4, 9, 37, device=DEVICE, dtype=to_dtype(backend))
    ids = torch.randint(37, (9,), device=DEVICE)
    weights = torch.ones(9, device=DEVICE).index_fill(0, torch.tensor(LEFT_OUT, device=DEVICE), 0)
    bad = four.clone()
    bad[:, LEFT_OUT] = math.nan

    def run(rows, **options):
        leaves = [x.clone().requires_grad_() for x in rows[:2]]
        if name == "vgs":
            setting = OBJECTIVES["adaptive"]
            out = vgs_loss(*leaves, *rows[2:], objective=setting, backend=backend, reduction="mean", **options)
        else:
            shared = {"backend": backend, "reduction": "mean", **DIVERGENCES[name], **options}
            out = divergence_loss(leaves[0], [(1.0, rows[2]), (0.5, rows[3])], **shared)
        out.loss.backward()
        return out, [x.grad for x in leaves]

    expected, gradients = run(four[:, KEPT], target_ids=ids[KEPT])
    ignored = ids.index_fill(0, torch.tensor(LEFT_OUT, device=DEVICE), NOBODY)
    for options in ({"target_ids": ignored}, {"token_weights": weights, "target_ids": ids}):
        out, found = run(bad, **options)
        torch.testing.assert_close(out.loss, expected.loss)
        for gradient, wanted in zip(found, gradients, strict=True):
            if wanted is not None:
                torch.testing.assert_close(gradient[KEPT], wanted)
                assert not gradient[LEFT_OUT].any()


@pytest.mark.parametrize("reduction", [None, "sum", "none"])
@pytest.mark.parametrize("name", [*OBJECTIVES, *DIVERGENCES])
def test_none_left(name, reduction):
    """A loss of 0, gradients of 0, terms of 0."""
    problem = make_problem(9, 57, bias=True)
    problem = replace(problem, **{state: torch.full_like(getattr(problem, state), math.nan) for state in STATES})
    shared = {"target_ids": torch.full_like(problem.target_ids, NOBODY), "reduction": reduction}
    leaves = problem.leaves()
    if name in OBJECTIVES:
        shared |= {"objective": OBJECTIVES[name], "trajectory_ids": TRAJECTORIES, "return_terms": name != "folded"}
        out = fused_linear_vgs_loss(*leaves.args(), **leaves.biases(), **shared)
    else:
        run = on_rows(fused_linear_divergence, COMPOSED)
        out = run(*leaves.args(), **leaves.biases(), **shared, **DIVERGENCES[name])
    out.loss.sum().backward()
    assert not out.loss.any() and not out.entropy.any() and not out.target_logps.any() and not out.counted.any()
    gradients = [getattr(leaves, key).grad for key in TRAINABLE]
    assert gradients[0] is not None and not any(x.any() for x in gradients if x is not None)


@pytest.mark.parametrize("name", ["gated", "adaptive trajectories", "jsd", "sampled"])
@pytest.mark.slow
def test_inside_a_compiled_caller(name):
    """The same as outside, where a look at the ids would cost nothing and here is not possible."""
    torch._dynamo.reset()
    problem = spoilt(make_problem(9, 57, dtype=torch.float64))

    def step(s, a, student, t, w, teacher, ids):
        if name in OBJECTIVES:
            given = {"objective": OBJECTIVES[name], "trajectory_ids": TRAJECTORIES, "backend": "torch"}
            out = fused_linear_vgs_loss(s, a, student, t, w, teacher, target_ids=ids, **given)
        else:
            rows = [(1.0, t, teacher), (0.5, w, teacher)]
            out = fused_linear_divergence(s, student, rows, target_ids=ids, backend="torch", **DIVERGENCES[name])
        return out.loss * 1, out.entropy, out.target_logps

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        leaves = problem.leaves()
        values = function(*leaves.args(), problem.target_ids)
        values[0].backward()
        gradients = [getattr(leaves, key).grad for key in TRAINABLE[: 3 if name in OBJECTIVES else 1]]
        results.append([*values, *gradients, leaves.student_weight.grad])
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()
