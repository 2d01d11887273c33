"""Composed targets: coefficients per token, shared heads, rows of the student itself, transforms of each row."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from divergence_checks import TEACHER, TINY, TRAINED, compare, each, on_rows
from divergence_oracle import family_oracle
from problems import DEVICE, assert_gradients_close, evaluate, make_problem, relative_error

from vgs_kernels import TargetRow, VGSObjective, fused_linear_divergence, fused_linear_vgs_loss

KINDS = {
    "reverse": {},
    "jsd": {"divergence": "jsd", "beta": 0.3},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 9},
    "teacher top-k": {"divergence": "forward_kl", "support": "teacher_top_k", "top_k": 9},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.01},
}
C = torch.tensor([0.0, 2 / 3, -0.4, 1.3, 2.0], dtype=torch.float64, device=DEVICE)
TARGETS = {
    "per token": {"t": 1.0, "a": C, "w": -C},
    "all per token": {"t": 1.5 - C, "w": C},
    "three rows": {"t": 0.6, "w": 0.3, "a": 0.1},
    "four rows": {"t": 1.0, "w": -0.5, "a": C, "s": 0.2},
    "shared head": {"t": 0.5, "w": 0.5},
    "capped": {"t": (1.2, 0.8, 12.0), "w": (-0.2, 0.8, 12.0)},
    "scaled alike": {"t": (1.2, 0.8, None), "w": (-0.2, 0.8, None)},
    "scaled apart": {"t": (C, 0.8, None), "w": (-0.2, 1.1, 20.0)},
    "cancelling": {"t": 1.0, "w": -1.0, "a": 1.0},
    "zero coefficient": {"t": 1.0, "w": 0.0},
    "the student's own": {"s": 0.7},
}


@pytest.mark.parametrize("workspace_bytes", [2**30, TINY])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TARGETS)
def test_float64(name, kind, workspace_bytes):
    problem = make_problem(5, 257, bias=True, dtype=torch.float64)
    compare(problem, TARGETS[name], workspace_bytes=workspace_bytes, target_ids=problem.target_ids, **KINDS[kind])


@pytest.mark.parametrize(
    ("name", "kind"), [("per token", "jsd"), ("scaled apart", "student top-k"), ("four rows", "jsd")]
)
@pytest.mark.parametrize("backend", ["loops", "triton"], indirect=True)
def test_float32(backend, name, kind):
    problem = make_problem(5, 131, bias=True)
    compare(problem, TARGETS[name], backend=backend, workspace_bytes=TINY, **KINDS[kind])


@pytest.mark.parametrize("name", ["per token", "shared head"])
def test_bfloat16(name):
    """Hidden states that share a head are combined and rounded before it: no worse than 16-bit logits."""
    problem = make_problem(5, 131, bias=True, dtype=torch.bfloat16)
    compose, options = TARGETS[name], KINDS["jsd"]
    exact, plain = (
        evaluate(on_rows(family_oracle, compose), problem, dtype=dtype, requires_grad=TRAINED, **options)
        for dtype in (torch.float64, None)
    )
    ours = evaluate(on_rows(fused_linear_divergence, compose), problem, requires_grad=TRAINED, **options)
    bars = {key: 2 * relative_error(g, exact.gradients[key]) for key, g in plain.gradients.items()}
    assert_gradients_close(ours, exact, rtol=bars)
    bar = 2 * relative_error(plain.output.divergence, exact.output.divergence)
    assert relative_error(ours.output.divergence, exact.output.divergence) <= bar


def test_coefficient_per_token_equals_tokens_apart():
    """Each token with its own coefficient is that token in a call of its own."""
    problem = make_problem(4, 131)
    coefficients = torch.tensor([0.0, 0.5, 1.0, -1.0], device=DEVICE)

    def call(part, c):
        rows = [(1.0, part.teacher_hidden, part.teacher_weight), (c, part.teacher_text_hidden, part.teacher_weight)]
        return fused_linear_divergence(part.student_hidden, part.student_weight, rows, divergence="jsd").divergence

    together = call(problem, coefficients)
    apart = [call(problem.rows(slice(i, i + 1)), float(c)) for i, c in enumerate(coefficients)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-5)


def test_coefficients_of_16_bit_calls_are_not_rounded():
    """A float32 coefficient of bfloat16 rows counts with all of its digits."""
    problem = make_problem(5, 131, dtype=torch.bfloat16)
    c = torch.full((5,), 1.0009765625, device=DEVICE)  # 1 in bfloat16
    compare(problem, {"t": c}, divergence="forward_kl", temperature=0.25)
    ours, one = (
        evaluate(on_rows(fused_linear_divergence, {"t": x}), problem, requires_grad=TRAINED, temperature=0.25).loss
        for x in (c, 1.0)
    )
    assert ours != one


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_gets_no_gradient(kind):
    """Live rows of the student and a teacher that requires grad: the student's own row alone receives one."""
    problem = make_problem(5, 131, bias=True)
    names = [
        "student_hidden",
        "student_text_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
    ]
    leaves = problem.leaves(names)
    coefficient = torch.ones(5, device=DEVICE, requires_grad=True)
    rows = [
        TargetRow(coefficient, leaves.teacher_hidden, leaves.teacher_weight, leaves.teacher_bias),
        TargetRow(0.5, leaves.student_text_hidden, leaves.student_weight, leaves.student_bias),
        TargetRow(-0.5, leaves.student_hidden, leaves.student_weight, leaves.student_bias),
    ]
    args = (leaves.student_hidden, leaves.student_weight)
    options = KINDS[kind]
    fused_linear_divergence(*args, rows, student_bias=leaves.student_bias, **options).loss.backward()
    assert all(x.grad is None for x in (leaves.student_text_hidden, leaves.teacher_hidden, coefficient))
    assert leaves.teacher_weight.grad is None
    compose = {"t": 1.0, "a": 0.5, "s": -0.5}
    frozen = evaluate(on_rows(fused_linear_divergence, compose), problem, requires_grad=TRAINED, **options)
    for name in TRAINED:
        torch.testing.assert_close(getattr(leaves, name).grad, frozen.gradients[name], rtol=1e-6, atol=1e-9)


def test_prior_row_of_a_frozen_copy():
    """The prior of q* from a head that is no longer the student's."""
    problem = make_problem(5, 131, bias=True, dtype=torch.float64)
    frozen = make_problem(5, 131, bias=True, dtype=torch.float64, seed=1)
    rows = [
        TargetRow(1.0, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias),
        TargetRow(2 / 3, frozen.student_text_hidden, frozen.student_weight, frozen.student_bias),
        TargetRow(-2 / 3, problem.teacher_text_hidden, problem.teacher_weight, problem.teacher_bias),
    ]
    hidden = [problem.student_hidden.clone().requires_grad_() for _ in range(2)]
    options = {"student_bias": problem.student_bias, "divergence": "jsd"}
    ours = fused_linear_divergence(hidden[0], problem.student_weight, rows, **options)
    exact = family_oracle(hidden[1], problem.student_weight, rows, **options)
    ours.loss.backward()
    exact.loss.backward()
    torch.testing.assert_close(ours.divergence, exact.divergence, rtol=1e-9, atol=1e-12)
    assert relative_error(hidden[0].grad, hidden[1].grad) < 1e-9


def test_steered_loss_is_the_composed_reverse_kl(backend):
    """eta (std + gamma vis) has the gradient of eta (1 + gamma) times the divergence to t + kappa (a - w)."""
    problem = make_problem(5, 131, bias=True)
    objective = VGSObjective(lam=0.0, eta=0.4)
    vgs = evaluate(fused_linear_vgs_loss, problem, objective=objective, requires_grad=TRAINED, backend=backend)
    run = on_rows(fused_linear_divergence, {"t": 1.0, "a": objective.kappa, "w": -objective.kappa})
    ours = evaluate(run, problem, requires_grad=TRAINED, grad_output=0.4 * (1 + objective.gamma), backend=backend)
    assert_gradients_close(ours, vgs, rtol=1e-4)


def test_rows_of_other_widths(backend):
    """A capped and a plain teacher beside each other, each with a hidden size of its own."""
    problem = make_problem(5, 131)
    wide = make_problem(5, 131, 24, 40, seed=3)
    rows = [
        TargetRow(0.5, problem.teacher_hidden, problem.teacher_weight, softcap=15.0),
        TargetRow(0.5, wide.teacher_hidden, wide.teacher_weight),
    ]
    double = [row._replace(hidden=row.hidden.double(), weight=row.weight.double()) for row in rows]
    exact = family_oracle(problem.student_hidden.double(), problem.student_weight.double(), double, divergence="jsd")
    args = (problem.student_hidden, problem.student_weight, rows)
    ours = fused_linear_divergence(*args, divergence="jsd", backend=backend)
    torch.testing.assert_close(ours.divergence.double(), exact.divergence, rtol=1e-4, atol=1e-5)


@each(["shared head", "cancelling", "per token", "four rows"], "per token", name="name")
def test_masked_columns_of_shared_heads(backend, name):
    """Coefficients of a head that sum to 0, or below, do not turn -inf into NaN or +inf."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    problem = make_problem(5, 57, bias=True, dtype=dtype)
    problem.student_bias[[0, 9, 56]] = problem.teacher_bias[[0, 9, 56]] = -torch.inf
    for options in (KINDS["reverse"], KINDS["jsd"]):
        ours = compare(problem, TARGETS[name], backend=backend, **options)
        assert all(gradient.isfinite().all() for gradient in ours.gradients.values())


def test_columns_masked_by_one_row():
    """A column that any row excludes has no probability in the target."""
    problem = make_problem(5, 57, bias=True, dtype=torch.float64)
    problem.teacher_bias[[3, 20]] = -torch.inf
    for compose in (TARGETS["three rows"], {"a": 0.5, "t": 0.5}, {"t": -0.5, "a": 1.5}):
        for options in ({"divergence": "forward_kl"}, KINDS["jsd"], KINDS["student top-k"]):
            ours = compare(problem, compose, **options)
            assert all(gradient.isfinite().all() for gradient in ours.gradients.values())


def test_a_row_more_with_coefficient_zero_changes_nothing():
    problem = make_problem(5, 57)
    nothing = torch.zeros(5, device=DEVICE)
    runs = [
        evaluate(on_rows(fused_linear_divergence, compose), problem, requires_grad=TRAINED)
        for compose in (TEACHER, {"t": 1.0, "w": nothing}, {"t": 1.0, "a": 0.0})
    ]
    for run in runs[1:]:
        torch.testing.assert_close(run.output.divergence, runs[0].output.divergence, rtol=1e-5, atol=1e-5)
        assert_gradients_close(run, runs[0], rtol=1e-5)


def test_tied_heads():
    """One tensor is the student's head and the target's: it receives the student's gradient alone."""
    problem = make_problem(5, 57)
    weight = problem.student_weight.clone().requires_grad_()
    other = problem.student_weight.clone()
    grads = []
    for head in (weight, other):
        weight.grad = None
        rows = [(1.0, problem.student_text_hidden, head)]
        fused_linear_divergence(problem.student_hidden, weight, rows, divergence="jsd").loss.backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-9)


def test_rows_given_as_tuples():
    problem = replace(make_problem(5, 57, bias=True), student_bias=None)
    row = (1.0, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias, 0.9, 20.0)
    outputs = [
        fused_linear_divergence(problem.student_hidden, problem.student_weight, [r]).loss
        for r in (row, TargetRow(*row))
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("changes", [{"logit_scale": 1.3}, {"softcap": 12.0}, {"bias": None}], ids=str)
def test_rows_of_one_weight_are_combined_only_where_the_heads_agree(changes):
    """Before the product; else it is two products, with the same result as of heads that share no memory."""
    problem = make_problem(5, 57, bias=True, dtype=torch.float64)
    row = TargetRow(1.0, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias, 0.8)
    other = TargetRow(-0.5, problem.teacher_text_hidden, problem.teacher_weight, problem.teacher_bias, 0.8)
    rows = [row, other._replace(**changes)]
    args = (problem.student_hidden, problem.student_weight, rows)
    found = [fused_linear_divergence(*args, fold=fold).divergence for fold in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
