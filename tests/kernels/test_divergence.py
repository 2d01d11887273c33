"""``fused_linear_divergence``: reverse KL to a composed target, and what it says about the VGS loss."""

from __future__ import annotations

import math

import pytest
import torch
from divergence_checks import TRAINED, on_rows
from oracle import divergence_oracle, vgs_oracle
from problems import (
    DEVICE,
    FAR,
    NEAR,
    Problem,
    assert_gradients_close,
    evaluate,
    float32_bars,
    largest_logit,
    make_problem,
    relative_error,
    value_floor,
)

from vgs_kernels import (
    FusedLinearDivergence,
    TargetRow,
    VGSObjective,
    fused_linear_divergence,
    fused_linear_vgs_loss,
)

TARGETS = {
    "teacher": {"t": 1.0},
    "visual gradient steering": {"t": 1.0, "a": 2 / 3, "w": -2 / 3},
    "contrastive": {"t": 2.0, "w": -1.0},
    "two teachers": {"t": 0.5, "w": 0.5},
    "one row damped": {"t": 0.7},
    "zero coefficient": {"t": 1.0, "w": 0.0},
}


def compare(problem: Problem, compose: dict[str, float], *, rtol: float, floor: float, backend: str, **options) -> None:
    kernel = {k: options.pop(k) for k in list(options) if k == "workspace_bytes"}
    exact = evaluate(
        on_rows(divergence_oracle, compose), problem, dtype=torch.float64, requires_grad=TRAINED, **options
    )
    ours = evaluate(
        on_rows(fused_linear_divergence, compose),
        problem,
        requires_grad=TRAINED,
        backend=backend,
        **kernel,
        **options,
    )
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=rtol, atol=floor)
    double = problem.student_hidden.dtype == torch.float64
    bars = rtol if double else float32_bars(problem, exact, on_rows(divergence_oracle, compose), **options)
    assert_gradients_close(ours, exact, rtol=bars)
    for name in ("divergence", "entropy", "target_logps"):
        actual, expected = getattr(ours.output, name), getattr(exact.output, name)
        if expected is None:
            assert actual is None
            continue
        assert not actual.requires_grad
        torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=floor, msg=name)


@pytest.mark.parametrize("gap", [pytest.param(FAR, id="far"), pytest.param(NEAR, id="near")])
@pytest.mark.parametrize("workspace_bytes", [2**30, 2**12])
@pytest.mark.parametrize("name", TARGETS)
def test_target_in_float64(name, workspace_bytes, gap):
    problem = make_problem(9, 257, gap=gap, bias=True, dtype=torch.float64)
    options = {"workspace_bytes": workspace_bytes, "target_ids": problem.target_ids}
    compare(problem, TARGETS[name], rtol=1e-9, floor=1e-11, backend="torch", **options)


@pytest.mark.parametrize("name", TARGETS)
def test_target_in_float32(backend, name):
    problem = make_problem(5, 131, bias=True)
    size = sum(map(abs, TARGETS[name].values()))  # the composed logits are that much larger
    compare(problem, TARGETS[name], rtol=1e-5, floor=size * value_floor(problem), backend=backend)


OPTIONS = {
    "temperature": {"temperature": 0.6},
    "weights": {"token_weights": torch.tensor([0.0, 1.0, -0.5, 2.0, 0.0], device=DEVICE)},
    "soft-cap": {"student_softcap": 15.0},
    "scale": {"student_logit_scale": 1.3},
    "all": {"temperature": 1.7, "student_softcap": 15.0, "student_logit_scale": 1.3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(backend, name):
    problem = make_problem(5, 131, bias=True)
    options = {**OPTIONS[name], "target_ids": problem.target_ids}
    floor = 3 * value_floor(problem, options.get("temperature", 1.0))
    compare(problem, TARGETS["visual gradient steering"], rtol=1e-5, floor=floor, backend=backend, **options)


def test_target_row_carries_scale_and_softcap(backend):
    """Each row is scaled and capped on its own before the rows are combined."""
    problem = make_problem(5, 131)
    t = problem.teacher_hidden @ problem.teacher_weight.T
    w = problem.teacher_text_hidden @ problem.teacher_weight.T
    composed = 1.0 * 12 * torch.tanh(0.8 * t / 12) - 0.5 * 1.1 * w
    rows = [
        TargetRow(1.0, problem.teacher_hidden, problem.teacher_weight, logit_scale=0.8, softcap=12.0),
        TargetRow(-0.5, problem.teacher_text_hidden, problem.teacher_weight, logit_scale=1.1),
    ]
    ours = fused_linear_divergence(
        problem.student_hidden, problem.student_weight, rows, backend=backend, temperature=0.9
    )
    identity = torch.eye(131, device=DEVICE)
    exact = divergence_oracle(
        problem.student_hidden.double(),
        problem.student_weight.double(),
        [(1.0, composed.double(), identity.double())],
        temperature=0.9,
    )
    torch.testing.assert_close(ours.divergence.double(), exact.divergence, rtol=1e-5, atol=3 * value_floor(problem))


def test_bfloat16_against_plain_pytorch(backend):
    problem = make_problem(7, 257, bias=True, dtype=torch.bfloat16)
    compose = TARGETS["visual gradient steering"]
    exact = evaluate(on_rows(divergence_oracle, compose), problem, dtype=torch.float64, requires_grad=TRAINED)
    eager = evaluate(on_rows(divergence_oracle, compose), problem, requires_grad=TRAINED)
    # The eager one has no combined rows, whose sum is rounded.
    run = on_rows(fused_linear_divergence, compose)
    ours = evaluate(run, problem, requires_grad=TRAINED, backend=backend, fold=False)
    bars = {name: 2 * relative_error(g, exact.gradients[name]) for name, g in eager.gradients.items()}
    assert_gradients_close(ours, exact, rtol=bars)
    torch.testing.assert_close(
        ours.output.divergence.double(), exact.output.divergence, rtol=1e-5, atol=3 * value_floor(problem)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_vgs_is_distillation_to_a_composed_target(backend, gamma):
    """The VGS gradient (lambda 0) is (1 + gamma) times that of the divergence to {t: 1, a: kappa, w: -kappa}."""
    problem = make_problem(7, 131, bias=True)
    kappa = gamma / (1 + gamma)
    compose = {"t": 1.0, "a": kappa, "w": -kappa}
    steered = evaluate(
        fused_linear_vgs_loss,
        problem,
        objective=VGSObjective(gamma=gamma, lam=0.0),
        requires_grad=TRAINED,
        backend=backend,
    )
    composed = evaluate(
        on_rows(fused_linear_divergence, compose),
        problem,
        requires_grad=TRAINED,
        grad_output=1 + gamma,
        backend=backend,
    )
    assert_gradients_close(composed, steered, rtol=1e-5)


def test_plain_objective_is_the_divergence_to_the_teacher(backend):
    problem = make_problem(7, 131, bias=True)
    plain = evaluate(
        fused_linear_vgs_loss,
        problem,
        objective=VGSObjective(gamma=0.0, lam=0.0),
        requires_grad=TRAINED,
        backend=backend,
    )
    divergence = evaluate(on_rows(fused_linear_divergence, {"t": 1.0}), problem, requires_grad=TRAINED, backend=backend)
    floor = value_floor(problem)
    torch.testing.assert_close(divergence.loss, plain.loss, rtol=1e-5, atol=floor)
    torch.testing.assert_close(divergence.output.divergence, plain.output.standard, rtol=1e-5, atol=floor)
    assert_gradients_close(divergence, plain, rtol=1e-5)


def test_language_preservation_is_the_divergence_of_the_text_rows(backend):
    """With every gate open, the text rows' gradient is lambda times that of KL(p_x || q_x)."""
    problem = make_problem(7, 131)
    lam = 0.3
    text = ["student_text_hidden"]
    ours = evaluate(
        fused_linear_vgs_loss,
        problem,
        objective=VGSObjective(lam=lam),
        vds_threshold=-1.0,
        requires_grad=text,
        backend=backend,
    )
    hidden = problem.student_text_hidden.clone().requires_grad_()
    target = [(1.0, problem.teacher_text_hidden, problem.teacher_weight)]
    (lam * fused_linear_divergence(hidden, problem.student_weight, target, backend=backend).loss).backward()
    assert relative_error(ours.gradients[text[0]], hidden.grad) < 1e-5


def test_divergence_to_itself_is_zero(backend):
    problem = make_problem(7, 131)
    hidden = problem.student_hidden.clone().requires_grad_()
    target = [(1.0, problem.student_hidden, problem.student_weight)]
    out = fused_linear_divergence(hidden, problem.student_weight, target, backend=backend)
    out.loss.backward()
    assert out.divergence.abs().max() <= value_floor(problem)
    assert hidden.grad.abs().max() <= 1e-6 * problem.student_weight.abs().max() * largest_logit(problem)


def test_padded_vocabulary_and_masked_columns(backend):
    problem = make_problem(5, 57, bias=True)
    problem.student_bias[[0, 9, 56]] = problem.teacher_bias[[0, 9, 56]] = -math.inf
    compare(problem, TARGETS["teacher"], rtol=1e-5, floor=value_floor(problem), backend=backend)
    compare(problem, TARGETS["teacher"], rtol=1e-5, floor=value_floor(problem), backend=backend, vocab_size=40)


def test_no_tokens(backend):
    problem = make_problem(0, 57, bias=True)
    out = evaluate(on_rows(fused_linear_divergence, {"t": 1.0}), problem, requires_grad=TRAINED, backend=backend)
    assert out.loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in out.gradients.values())


@pytest.mark.parametrize("name", TRAINED)
def test_gradient_only_where_required(backend, name):
    problem = make_problem(5, 57, bias=True)
    run = on_rows(divergence_oracle, TARGETS["contrastive"])
    exact = evaluate(run, problem, dtype=torch.float64, requires_grad=[name])
    ours = evaluate(
        on_rows(fused_linear_divergence, TARGETS["contrastive"]), problem, requires_grad=[name], backend=backend
    )
    assert_gradients_close(ours, exact, rtol=float32_bars(problem, exact, run))


def test_gradcheck_float64():
    problem = make_problem(4, 11, 3, 4, bias=True, dtype=torch.float64)
    leaves = [getattr(problem, name).clone().requires_grad_() for name in TRAINED]
    target = [(1.5, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)]

    def loss(hidden, weight, bias):
        return fused_linear_divergence(
            hidden, weight, target, student_bias=bias, student_softcap=20.0, temperature=1.2
        ).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_module_form(backend):
    problem = make_problem(5, 57)
    target = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    args = (problem.student_hidden, problem.student_weight, target)
    module = FusedLinearDivergence(temperature=0.7, backend=backend)
    torch.testing.assert_close(
        module(*args).loss, fused_linear_divergence(*args, temperature=0.7, backend=backend).loss
    )


def test_vgs_oracle_and_divergence_oracle_agree():
    problem = make_problem(7, 57, dtype=torch.float64)
    target = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    divergence = divergence_oracle(problem.student_hidden, problem.student_weight, target).divergence
    torch.testing.assert_close(divergence, vgs_oracle(*problem.args(), objective=VGSObjective()).standard)
