"""Every option of the objective and of the call against the oracle: in float64 to 1e-9, in Triton in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from covering import on_backends
from loss_checks import compare, weights
from oracle import vgs_oracle
from problems import (
    DEVICE,
    INPUTS,
    Problem,
    assert_gradients_close,
    assert_terms_close,
    evaluate,
    make_problem,
    value_floor,
)

from vgs_kernels import VGSObjective, fused_linear_vgs_loss

Options = dict[str, Any]
STRONG = {"lam": 0.5}  # a language term that a relative error can see


def objective(**changes: Any) -> Callable[[Problem], Options]:
    return lambda problem: {"objective": VGSObjective(**{**STRONG, **changes})}


def call(**options: Any) -> Callable[[Problem], Options]:
    """Options, of which callables are given the problem."""
    setting = VGSObjective(**STRONG)
    return lambda problem: {"objective": setting, **{k: v(problem) if callable(v) else v for k, v in options.items()}}


def trajectories(problem: Problem) -> torch.Tensor:
    """Interleaved, unsorted, negative and large trajectory ids of different lengths, one of a single token."""
    ids = torch.tensor([5, -1, 2**40], device=DEVICE)[torch.arange(problem.tokens, device=DEVICE) % 3]
    ids[-1] = 77
    return ids


def scores(problem: Problem) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(problem.tokens, generator=generator).to(DEVICE)


OPTIONS = {
    "defaults": objective(lam=0.01),
    "gamma=0": objective(gamma=0.0),
    "gamma=4": objective(gamma=4.0),
    "lam=0": objective(lam=0.0),
    "lam=1": objective(lam=1.0),
    "plain": objective(gamma=0.0, lam=0.0),
    "eta": objective(eta=0.41),
    "temperature=0.7": objective(temperature=0.7),
    "temperature=2": objective(temperature=2.0, detach_prior=False),
    "live prior": objective(detach_prior=False),
    "live prior, lam=0": objective(detach_prior=False, lam=0.0),
    "live prior, gamma=0": objective(detach_prior=False, gamma=0.0),
    "adaptive": objective(schedule="adaptive"),
    "adaptive, lam=0": objective(schedule="adaptive", lam=0.0),
    "adaptive, live prior": objective(schedule="adaptive", detach_prior=False, adaptive_quantile=0.2),
    "adaptive, equal quantiles": objective(schedule="adaptive", adaptive_quantile=0.7),
    "quantile=0": objective(vds_quantile=0.0),
    "quantile=0.5": objective(vds_quantile=0.5),
    "quantile=1": objective(vds_quantile=1.0),
    "trajectory": call(objective=lambda _: VGSObjective(vds_scope="trajectory", **STRONG), trajectory_ids=trajectories),
    "trajectory, adaptive": call(
        objective=lambda _: VGSObjective(vds_scope="trajectory", schedule="adaptive", **STRONG),
        trajectory_ids=trajectories,
    ),
    "ranks without a process group": objective(vds_scope="ranks"),
    "given vds": call(vds=scores),
    "given vds, adaptive": call(vds=scores, objective=lambda _: VGSObjective(schedule="adaptive", **STRONG)),
    "given threshold": call(vds_threshold=0.3),
    "given threshold, tensor": call(vds_threshold=torch.tensor(0.3, device=DEVICE)),
    "given threshold, none above": call(vds_threshold=1e9),
    "given threshold, all above": call(vds_threshold=-1.0),
    "given thresholds, adaptive": call(
        vds_threshold=(0.05, 0.5), objective=lambda _: VGSObjective(schedule="adaptive", **STRONG)
    ),
    "given thresholds, adaptive, tensors": call(
        vds_threshold=(torch.tensor(0.05, device=DEVICE), torch.tensor(0.5, device=DEVICE)),
        objective=lambda _: VGSObjective(schedule="adaptive", **STRONG),
    ),
    "given vds and threshold": call(vds=scores, vds_threshold=0.4),
    "token weights": call(token_weights=weights),
    "all weights zero": call(token_weights=lambda p: torch.zeros(p.tokens, device=DEVICE)),
    "student soft-cap": call(student_softcap=12.0),
    "teacher soft-cap": call(teacher_softcap=12.0),
    "soft-caps, live prior": call(
        student_softcap=15.0,
        teacher_softcap=20.0,
        objective=lambda _: VGSObjective(detach_prior=False, temperature=1.3, **STRONG),
    ),
    "logit scales": call(student_logit_scale=0.7, teacher_logit_scale=1.4),
    "scale, soft-cap, temperature": call(
        student_softcap=25.0,
        student_logit_scale=1.5,
        teacher_softcap=10.0,
        teacher_logit_scale=0.5,
        objective=lambda _: VGSObjective(temperature=0.8, **STRONG),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("workspace_bytes", [pytest.param(2**30, id="whole"), pytest.param(2**13, id="tiled")])
def test_option_in_float64(name, workspace_bytes):
    problem = make_problem(17, 257, bias=True, dtype=torch.float64)
    compare(problem, OPTIONS[name](problem), backend="torch", workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["loops", "triton"], indirect=True)
def test_option_in_float32(backend, name):
    problem = make_problem(7, 131, bias=True)
    compare(problem, OPTIONS[name](problem), backend=backend, workspace_bytes=2**15)


def test_options_change_the_loss():
    """Guards the table above: every option except the listed neutral ones moves loss or gradient."""
    problem = make_problem(17, 257, bias=True, dtype=torch.float64)
    base = evaluate(vgs_oracle, problem, **objective()(problem))
    neutral = {"ranks without a process group"}
    for name, build in OPTIONS.items():
        moved = evaluate(vgs_oracle, problem, **build(problem))
        same = all(
            torch.equal(gradient, base.gradients[key]) if gradient is not None else base.gradients[key] is None
            for key, gradient in moved.gradients.items()
        )
        assert same == (name in neutral), name


# --------------------------------------------------------------------------------------------- gate and quantile


@pytest.mark.parametrize(
    ("tokens", "quantile"), [(n, q) for n in (1, 2, 11, 101, 1001) for q in (0.1, 0.4, 0.7, 0.9)] + [(76, 0.84)]
)
def test_quantile_that_falls_on_a_token_excludes_it(tokens, quantile):
    """q (N - 1) is an integer for N = 11, 101, 1001, 76; for N = 76, float32 rounding would open one gate more."""
    problem = make_problem(tokens, 11, 4, 5, dtype=torch.float64)
    vds = torch.rand(tokens, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    out = fused_linear_vgs_loss(*problem.args(), objective=VGSObjective(vds_quantile=quantile), vds=vds)
    expected = tokens - 1 - math.floor(round(quantile * (tokens - 1), 9))
    assert int(out.gate.sum()) == expected
    assert torch.equal(out.gate, vds > torch.quantile(vds, quantile))


def test_ties_at_the_quantile_stay_closed(backend):
    """Equal scores at the threshold are not strictly above it: all of a tie stays closed, not a part of it."""
    problem = make_problem(9, 57, dtype=torch.float64 if backend == "torch" else torch.float32)
    for vds in ([1.0] * 9, [0.0] * 3 + [1.0] * 6, [0.1] * 2 + [1.0] * 5 + [2.0] * 2, [0.0] * 9):
        scores = torch.tensor(vds, device=DEVICE)[torch.randperm(9, generator=torch.Generator().manual_seed(1))]
        compare(problem, {"objective": VGSObjective(**STRONG), "vds": scores}, backend=backend)


def test_adaptive_gamma_at_its_thresholds():
    """gamma is 0 at vds = Q_low and gamma / 2 at vds = Q_high: both comparisons are strict."""
    problem = make_problem(4, 57, dtype=torch.float64)
    setting = VGSObjective(schedule="adaptive", gamma=3.0, lam=0.0)
    vds = torch.tensor([0.25, 0.3, 0.5, 0.75], dtype=torch.float64, device=DEVICE)
    ours = evaluate(fused_linear_vgs_loss, problem, objective=setting, vds=vds, vds_threshold=(0.25, 0.5))
    terms = ours.output
    gamma = torch.tensor([0.0, 1.5, 1.5, 3.0], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(ours.loss, (terms.standard + gamma * terms.visual).mean(), check_dtype=False)
    assert terms.gate.tolist() == [False, False, False, True]


def test_given_vds_is_reported_and_used():
    problem = make_problem(5, 57)
    vds = torch.tensor([5.0, 1.0, 2.0, 3.0, 4.0], device=DEVICE)
    out = fused_linear_vgs_loss(*problem.args(), vds=vds)
    torch.testing.assert_close(out.vds, vds)
    assert out.gate.tolist() == [True, False, False, False, True]


# ------------------------------------------------------------------------------------------- weights and heads


def test_uniform_weights_are_the_default(backend):
    problem = make_problem(5, 57, bias=True)
    uniform = torch.full((5,), 0.2, device=DEVICE)
    default = evaluate(fused_linear_vgs_loss, problem, backend=backend)
    given = evaluate(fused_linear_vgs_loss, problem, backend=backend, token_weights=uniform)
    torch.testing.assert_close(given.loss, default.loss)
    assert_gradients_close(given, default, rtol=1e-6)


def padded(problem: Problem, student_rows: int, teacher_rows: int, fill: float) -> Problem:
    """Heads with more rows than the vocabulary, a different number each, holding ``fill``."""

    def pad(tensor: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_full((rows, *tensor.shape[1:]), fill)])

    return replace(
        problem,
        student_weight=pad(problem.student_weight, student_rows),
        student_bias=pad(problem.student_bias, student_rows),
        teacher_weight=pad(problem.teacher_weight, teacher_rows),
        teacher_bias=pad(problem.teacher_bias, teacher_rows),
    )


@on_backends(extra=[(6, 11), (0, 5), (5, 0)], fill=[0.0, 3.0, math.nan])
def test_padded_vocabulary(backend, extra, fill):
    """Rows beyond ``vocab_size`` are never looked at, whatever they hold, and receive a zero gradient."""
    problem = make_problem(5, 57, bias=True)
    wide = padded(problem, *extra, fill)
    options = {"objective": VGSObjective(**STRONG), "backend": backend}
    expected = evaluate(fused_linear_vgs_loss, problem, **options)
    ours = evaluate(fused_linear_vgs_loss, wide, vocab_size=57, **options)
    torch.testing.assert_close(ours.loss, expected.loss)
    for name, gradient in ours.gradients.items():
        exact = expected.gradients[name]
        if gradient.shape != exact.shape:
            assert not gradient[57:].any(), name
            gradient = gradient[:57]
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-7)


EXCLUDED = [0, 3, 7, 56]  # first, last and inner columns


def with_bias(problem: Problem, value: float, *names: str) -> Problem:
    """The named biases set to ``value`` in the excluded columns."""
    changed = {}
    for name in names:
        bias = getattr(problem, name).clone()
        bias[EXCLUDED] = value
        changed[name] = bias
    return replace(problem, **changed)


@on_backends(
    columns=["both", "student only", "teacher only, student underflows"],
    workspace_bytes=[2**30, 2**11],
    live=[False, True],
)
def test_columns_masked_to_minus_infinity(backend, columns, workspace_bytes, live):
    """0 * inf is 0: finite wherever the oracle is, in every term and every gradient."""
    problem = make_problem(5, 57, bias=True)
    if columns == "both":
        problem = with_bias(problem, -math.inf, "student_bias", "teacher_bias")
    elif columns == "student only":
        problem = with_bias(problem, -math.inf, "student_bias")
    else:
        problem = with_bias(with_bias(problem, -math.inf, "teacher_bias"), -1e4, "student_bias")
    options = {
        "objective": VGSObjective(detach_prior=not live, **STRONG),
        "target_ids": torch.full((5,), 9, device=DEVICE),
    }
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    assert exact.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in exact.gradients.values())
    compare(problem, options, backend=backend, workspace_bytes=workspace_bytes)


def test_masked_column_stays_masked_under_a_softcap(backend):
    problem = with_bias(make_problem(5, 57, bias=True), -math.inf, "student_bias", "teacher_bias")
    for live in (False, True):
        setting = VGSObjective(detach_prior=not live, **STRONG)
        compare(problem, {"objective": setting, "student_softcap": 15.0, "teacher_softcap": 20.0}, backend=backend)


def test_a_whole_tile_masked(backend):
    """The first and the last columns all excluded: a running maximum starts at -inf and must survive it."""
    problem = make_problem(3, 700, bias=True)
    problem.student_bias[:300] = problem.teacher_bias[:300] = -math.inf
    problem.student_bias[500:] = problem.teacher_bias[500:] = -math.inf
    options = {"objective": VGSObjective(**STRONG), "target_ids": torch.full((3,), 400, device=DEVICE)}
    compare(problem, options, backend=backend, workspace_bytes=2**12)


def test_target_id_in_a_masked_column(backend):
    problem = with_bias(make_problem(3, 57, bias=True), -math.inf, "student_bias", "teacher_bias")
    ids = torch.tensor([3, 5, 56], device=DEVICE)
    out = fused_linear_vgs_loss(*problem.args(), target_ids=ids, backend=backend, **problem.biases())
    assert out.target_logps.isneginf().tolist() == [True, False, True]
    assert out.loss.isfinite()


def test_workspace_of_any_size_gives_the_same(backend):
    problem = make_problem(7, 131, bias=True)
    options = {"objective": VGSObjective(**STRONG), "backend": backend}
    whole = evaluate(fused_linear_vgs_loss, problem, **options)
    for size in (1, 2**10, 2**14):
        tiled = evaluate(fused_linear_vgs_loss, problem, workspace_bytes=size, **options)
        assert_terms_close(tiled.output, whole.output, rtol=1e-5, floor=value_floor(problem))
        assert_gradients_close(tiled, whole, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in INPUTS if "weight" not in name])
def test_every_hidden_input_matters(name):
    """Guards against rows swapped or ignored: exchanging one input's two tokens changes the loss."""
    problem = make_problem(2, 57, dtype=torch.float64)
    swapped = replace(problem, **{name: getattr(problem, name).flip(0)})
    losses = [fused_linear_vgs_loss(*p.args(), vds_threshold=-1.0).loss for p in (problem, swapped)]
    assert (losses[0] - losses[1]).abs() > 1e-3
