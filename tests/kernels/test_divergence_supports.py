"""Sums over a part of the vocabulary: teacher's and student's top-k, plausible entries."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from divergence_checks import CONTRASTIVE, STEERED, TEACHER, TINY, TRAINED, compare, each, on_rows
from problems import DEVICE, FAR, NEAR, Problem, largest_logit, make_problem, relative_error

from vgs_kernels import fused_linear_divergence

JSD = {"divergence": "jsd"}
FORWARD = {"divergence": "forward_kl"}
SUPPORTS = {
    "teacher, reverse": {"support": "teacher_top_k", "top_k": 16},
    "teacher, forward": {"support": "teacher_top_k", "top_k": 7, **FORWARD, "clip": 0.05},
    "teacher, jsd, clip": {"support": "teacher_top_k", "top_k": 32, **JSD, "clip": 0.01},
    "teacher, T^2": {"support": "teacher_top_k", "top_k": 8, **JSD, "temperature": 2.0, "temperature_squared": True},
    "student, reverse": {"support": "student_top_k", "top_k": 16},
    "student, forward": {"support": "student_top_k", "top_k": 7, **FORWARD},
    "student, jsd": {"support": "student_top_k", "top_k": 32, **JSD},
    "student, jsd, clips": {
        "support": "student_top_k",
        "top_k": 8,
        **JSD,
        "beta": 0.2,
        "clip": 0.02,
        "token_clip": 0.05,
    },
    "student, T": {"support": "student_top_k", "top_k": 8, **JSD, "temperature": 0.6, "student_softcap": 15.0},
    "student, one": {"support": "student_top_k", "top_k": 1, **FORWARD},
    "plausible, forward": {"support": "plausible", "plausibility": 0.01, **FORWARD},
    "plausible, jsd": {"support": "plausible", "plausibility": 0.003, **JSD},
    "plausible, T^2, clip": {
        "support": "plausible",
        "plausibility": 0.01,
        **FORWARD,
        "temperature": 1.4,
        "temperature_squared": True,
        "clip": 0.05,
    },
    "plausible, one": {"support": "plausible", "plausibility": 1.0, **FORWARD},
}
GAPS = [pytest.param(FAR, id="far"), pytest.param(NEAR, id="near")]


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("workspace_bytes", [2**30, TINY])
@pytest.mark.parametrize("name", SUPPORTS)
def test_float64(name, workspace_bytes, gap):
    problem = make_problem(9, 257, gap=gap, bias=True, dtype=torch.float64)
    compose = CONTRASTIVE if "plausible" in name else STEERED
    compare(problem, compose, workspace_bytes=workspace_bytes, target_ids=problem.target_ids, **SUPPORTS[name])


@each(SUPPORTS, name="name")
def test_float32(backend, name):
    problem = make_problem(33, 257, bias=True)
    compare(problem, TEACHER, backend=backend, workspace_bytes=2**15, target_ids=problem.target_ids, **SUPPORTS[name])


@pytest.mark.parametrize("workspace_bytes", [2**30, TINY])
@pytest.mark.parametrize("name", ["teacher, jsd, clip", "student, jsd, clips", "plausible, forward"])
def test_float32_in_triton(name, workspace_bytes):
    pytest.importorskip("triton")
    problem = make_problem(5, 131, bias=True)
    compare(problem, CONTRASTIVE, backend="triton", workspace_bytes=workspace_bytes, **SUPPORTS[name])


@each(["teacher, jsd, clip", "student, jsd", "plausible, forward"], "student, jsd", name="name")
def test_bfloat16(backend, name):
    problem = make_problem(5, 131, bias=True, dtype=torch.bfloat16)
    compare(problem, TEACHER, backend=backend, **SUPPORTS[name])


@each(["teacher_top_k", "student_top_k"], "student_top_k", name="support")
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_top_k_of_the_whole_vocabulary_is_full(backend, support, divergence):
    problem = make_problem(5, 57, bias=True, dtype=torch.float64 if backend == "torch" else torch.float32)
    ours = compare(problem, TEACHER, backend=backend, divergence=divergence, support=support, top_k=57)
    full = compare(problem, TEACHER, backend=backend, divergence=divergence)
    torch.testing.assert_close(ours.output.divergence, full.output.divergence, rtol=1e-5, atol=2e-6)
    for name in TRAINED:
        assert relative_error(ours.gradients[name], full.gradients[name]) < 1e-4


@pytest.mark.parametrize("name", ["teacher, reverse", "student, jsd"])
def test_top_k_beyond_a_padded_vocabulary(name):
    """k counts against the columns that are used."""
    problem = make_problem(5, 57, bias=True, dtype=torch.float64)
    options = {**SUPPORTS[name], "vocab_size": 40}
    compare(problem, TEACHER, **{**options, "top_k": 40})
    with pytest.raises(ValueError, match=r"top_k .*40.*41"):
        on_rows(fused_linear_divergence, TEACHER)(*problem.args(), **{**options, "top_k": 41})


def tied(problem: Problem, columns: list[int], bias: float) -> Problem:
    """The given columns equal to the last bit in whatever order products are summed: their logits are the bias."""
    changed = {}
    for name in ("student", "teacher"):
        for part, value in (("weight", 0.0), ("bias", bias)):
            changed[f"{name}_{part}"] = getattr(problem, f"{name}_{part}").clone()
            changed[f"{name}_{part}"][columns] = value
    return replace(problem, **changed)


@pytest.mark.parametrize("workspace_bytes", [2**30, 2**11])
@each(["teacher_top_k", "student_top_k"], "student_top_k", name="support")
def test_ties_at_the_last_place_are_inside(backend, support, workspace_bytes):
    """Six columns tie in the first place, in different tiles; k ends among them: all six are summed over."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    columns = [3, 20, 64, 65, 100, 130]
    problem = make_problem(2, 131, bias=True, dtype=dtype)
    problem = tied(problem, columns, bias=largest_logit(problem) + 2)
    options = {"backend": backend, "workspace_bytes": workspace_bytes, "support": support, **JSD}
    if backend == "triton":
        compare(problem, TEACHER, top_k=4, **options)
        return
    runs = [compare(problem, TEACHER, top_k=k, **options).output.divergence for k in (1, 4, 6)]
    torch.testing.assert_close(runs[0], runs[2], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(runs[1], runs[2], rtol=1e-6, atol=1e-9)
    assert not torch.allclose(compare(problem, TEACHER, top_k=7, **options).output.divergence, runs[2])


def test_all_entries_tie(backend):
    """Uniform rows: top-1 is the vocabulary."""
    problem = make_problem(3, 57)
    zero = replace(problem, student_hidden=torch.zeros_like(problem.student_hidden))
    zero = replace(zero, teacher_hidden=torch.zeros_like(problem.teacher_hidden))
    for support in ("teacher_top_k", "student_top_k"):
        ours = compare(zero, TEACHER, backend=backend, support=support, top_k=1, requires_grad=["student_weight"])
        assert ours.output.divergence.abs().max() < 1e-6


@pytest.mark.parametrize("workspace_bytes", [2**30, 2**11])
def test_plausibility_looks_at_the_first_row_alone(workspace_bytes):
    """Swapping the rows keeps the composed target and changes the set."""
    problem = make_problem(9, 131, bias=True, dtype=torch.float64)
    options = {**SUPPORTS["plausible, forward"], "workspace_bytes": workspace_bytes, "plausibility": 0.05}
    there = compare(problem, {"t": 0.5, "w": 0.5}, **options).output.divergence
    back = compare(problem, {"w": 0.5, "t": 0.5}, **options).output.divergence
    assert not torch.allclose(there, back)


def test_plausible_first_row_keeps_its_own_scale():
    """The coefficient does not sharpen the row that decides, its logit scale and soft-cap do."""
    problem = make_problem(9, 131, bias=True, dtype=torch.float64)
    options = {**SUPPORTS["plausible, forward"], "plausibility": 0.05}
    compare(problem, {"t": (0.5, 2.0, 9.0), "w": (-0.5, 1.2, None)}, **options)


@each(["teacher, reverse", "student, reverse", "teacher, jsd, clip", "plausible, jsd"], "student, reverse", name="name")
def test_masked_columns(backend, name):
    """Columns that both exclude are never among the greatest, unless too few others are left."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    problem = make_problem(5, 57, bias=True, dtype=dtype)
    problem.student_bias[40:] = problem.teacher_bias[40:] = -torch.inf
    problem.student_bias[0] = problem.teacher_bias[0] = -torch.inf
    compare(problem, TEACHER, backend=backend, workspace_bytes=2**11, **SUPPORTS[name])
    if "top_k" in SUPPORTS[name]:
        compare(problem, TEACHER, backend=backend, **{**SUPPORTS[name], "top_k": 50})


def test_columns_masked_by_the_student_alone():
    """Top-k with a tail, and plausible entries, of a target that has mass where the student has none."""
    problem = make_problem(5, 57, bias=True, dtype=torch.float64)
    problem.student_bias[[5, 9]] = -torch.inf
    for name in ("student, reverse", "student, jsd", "student, forward", "teacher, reverse", "plausible, jsd"):
        compare(problem, TEACHER, **SUPPORTS[name])


def test_tail_of_a_certain_student():
    """p = 1 within rounding: the tail is a difference of nearly equal numbers unless it is summed up."""
    problem = make_problem(5, 131, gap=NEAR)
    certain = replace(problem, student_hidden=problem.student_hidden * 3, teacher_hidden=problem.teacher_hidden * 3)
    ours = compare(certain, TEACHER, support="student_top_k", top_k=4, divergence="reverse_kl")
    assert ours.output.divergence.min() > -1e-5 and torch.isfinite(ours.gradients["student_hidden"]).all()


def test_tail_keeps_its_digits(backend):
    """The tail of a certain student is a sum; 1 - p(7) in float32 would leave none of its digits."""
    weight, hidden = torch.zeros(131, 3, device=DEVICE), torch.zeros(1, 3, device=DEVICE)
    biases = torch.zeros(2, 131, device=DEVICE)
    biases[:, 7] = torch.tensor([20.0, 5.0])
    out = fused_linear_divergence(
        hidden, weight, [(1.0, hidden, weight, biases[1])], student_bias=biases[0],
        support="student_top_k", top_k=1, divergence="forward_kl", backend=backend,
    )  # fmt: skip
    p, q = (130 / (130 + math.exp(bias)) for bias in (20.0, 5.0))
    exact = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    assert abs(out.divergence.item() - exact) < 1e-5 * exact
