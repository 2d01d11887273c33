"""Every divergence against the float64 oracle: values and gradients, in every precision, on both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergence_checks import CONTRASTIVE, STEERED, TEACHER, TINY, TRAINED, compare, each, on_rows
from divergence_oracle import family_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DEVICE, FAR, NEAR, evaluate, make_problem, relative_error

from vgs_kernels import Divergence, FusedLinearDivergence, fused_linear_divergence

GAPS = [pytest.param(FAR, id="far"), pytest.param(NEAR, id="near")]
WEIGHTS = torch.tensor([0.0, 1.0, -0.5, 2.0, 0.3], device=DEVICE)
JSD: dict[str, Any] = {"divergence": "jsd"}

FAMILY: dict[str, dict[str, Any]] = {
    "reverse": {},
    "forward": {"divergence": "forward_kl"},
    "jsd": JSD,
    "jsd 0.1": {**JSD, "beta": 0.1},
    "jsd 0.9": {**JSD, "beta": 0.9},
    "jsd 0": {**JSD, "beta": 0.0},
    "jsd 1": {**JSD, "beta": 1.0},
    "sampled": {"divergence": "sampled_reverse_kl"},
    "reverse, clip": {"clip": 0.02},
    "reverse, clip 0": {"clip": 0.0},
    "forward, clip": {"divergence": "forward_kl", "clip": 0.02},
    "jsd, clip": {**JSD, "clip": 0.005},
    "jsd 1, clip": {**JSD, "beta": 1.0, "clip": 0.02},
    "reverse, token clip": {"token_clip": 0.3},
    "jsd, both clips": {**JSD, "clip": 0.02, "token_clip": 0.03},
    "sampled, token clip": {"divergence": "sampled_reverse_kl", "token_clip": 0.3},
    "reverse, T": {"temperature": 1.7},
    "forward, T": {"divergence": "forward_kl", "temperature": 0.6},
    "jsd, T^2": {**JSD, "beta": 0.3, "temperature": 2.0, "temperature_squared": True},
    "forward, T^2, clip": {"divergence": "forward_kl", "temperature": 0.7, "temperature_squared": True, "clip": 0.03},
    "sampled, T^2": {"divergence": "sampled_reverse_kl", "temperature": 1.5, "temperature_squared": True},
    "jsd, student transform": {**JSD, "student_softcap": 15.0, "student_logit_scale": 1.3},
    "forward, student transform": {"divergence": "forward_kl", "student_softcap": 12.0, "temperature": 1.3},
}
#: On Triton, which its interpreter makes slow.
SHORT = ["forward", "jsd", "jsd 0.1", "sampled", "forward, clip", "jsd, both clips", "jsd, T^2", "reverse, clip"]


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("workspace_bytes", [2**30, TINY])
@pytest.mark.parametrize("name", FAMILY)
def test_float64(name, workspace_bytes, gap):
    problem = make_problem(9, 257, gap=gap, bias=True, dtype=torch.float64)
    compare(problem, STEERED, workspace_bytes=workspace_bytes, target_ids=problem.target_ids, **FAMILY[name])


@pytest.mark.parametrize("gap", GAPS)
@each(FAMILY, name="name")
def test_float32(backend, name, gap):
    problem = make_problem(33, 257, gap=gap, bias=True)
    compare(problem, TEACHER, backend=backend, workspace_bytes=2**15, target_ids=problem.target_ids, **FAMILY[name])


@pytest.mark.parametrize(
    ("name", "workspace_bytes"), [*((name, 2**30) for name in SHORT), ("jsd, both clips", TINY), ("forward", TINY)]
)
def test_float32_in_triton(name, workspace_bytes):
    pytest.importorskip("triton")
    problem = make_problem(5, 131, bias=True)
    options = {"target_ids": problem.target_ids, "token_weights": WEIGHTS, "workspace_bytes": workspace_bytes}
    compare(problem, CONTRASTIVE, backend="triton", **options, **FAMILY[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", GAPS)
@each(["forward", "jsd", "sampled", "jsd, clip"], "jsd", name="name")
def test_half(backend, name, gap, dtype):
    """Values as exact as in float32, gradients at most twice as far as those of 16-bit logits and autograd."""
    problem = make_problem(33 if backend == "torch" else 5, 131, gap=gap, bias=True, dtype=dtype)
    ours = compare(problem, TEACHER, backend=backend, target_ids=problem.target_ids, **FAMILY[name])
    assert all(gradient.dtype == dtype for gradient in ours.gradients.values())


def test_half_head_gradient_of_many_chunks():
    """Sums over chunks are taken in float32."""
    problem = make_problem(129, 257, dtype=torch.bfloat16)
    exact = evaluate(on_rows(family_oracle, TEACHER), problem, dtype=torch.float64, requires_grad=TRAINED, **JSD)
    run = on_rows(fused_linear_divergence, TEACHER)
    whole, cut = (evaluate(run, problem, requires_grad=TRAINED, workspace_bytes=b, **JSD) for b in (2**30, 2**14))
    errors = [relative_error(x.gradients["student_weight"], exact.gradients["student_weight"]) for x in (whole, cut)]
    assert errors[0] < 4e-3
    assert errors[1] < 1.5 * errors[0]


def test_every_knob_changes_the_gradient():
    """Guards the table above, and each clip in it cuts some entries and not all."""
    problem = make_problem(9, 257, bias=True, dtype=torch.float64)
    seen: dict[str, torch.Tensor] = {}
    twins = {"jsd 0": "forward", "jsd 1": "reverse", "jsd 1, clip": "reverse, clip"}
    for name, options in FAMILY.items():
        run = evaluate(
            on_rows(family_oracle, STEERED), problem, requires_grad=TRAINED, target_ids=problem.target_ids, **options
        )
        gradient = run.gradients["student_hidden"]
        assert gradient.any()
        same = [other for other, g in seen.items() if torch.allclose(g, gradient, rtol=1e-6)]
        assert same == ([twins[name]] if name in twins else []), name
        if name not in twins:
            seen[name] = gradient


@pytest.mark.parametrize("beta", [1e-3, 1 - 1e-3])
def test_jsd_near_its_end_points(beta):
    """The JSD over beta (1 - beta) tends to the KLs."""
    problem = make_problem(9, 131, gap=0.1, bias=True, dtype=torch.float64)
    target = [(1.0, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)]
    args = (problem.student_hidden, problem.student_weight, target)
    jsd = fused_linear_divergence(*args, divergence="jsd", beta=beta, student_bias=problem.student_bias).divergence
    kl = fused_linear_divergence(*args, divergence="jsd", beta=round(beta), student_bias=problem.student_bias)
    torch.testing.assert_close(jsd / (beta * (1 - beta)), kl.divergence, rtol=0.05, atol=0)


def test_jsd_is_bounded_and_symmetric():
    """At beta 0.5 it is at most ln 2, and the same either way round."""
    problem = make_problem(9, 131, gap=2.0, dtype=torch.float64)
    student = (problem.student_hidden, problem.student_weight)
    teacher = (problem.teacher_hidden, problem.teacher_weight)
    there = fused_linear_divergence(*student, [(1.0, *teacher)], divergence="jsd").divergence
    back = fused_linear_divergence(*teacher, [(1.0, *student)], divergence="jsd").divergence
    torch.testing.assert_close(there, back, rtol=1e-10, atol=0)
    assert 0.01 < there.max() <= 0.6931472 and there.min() >= 0


def test_module_form():
    problem = make_problem(5, 131)
    target = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    args = (problem.student_hidden, problem.student_weight, target)
    options = {**FAMILY["jsd, both clips"], "support": "teacher_top_k", "top_k": 9}
    ours, expected = FusedLinearDivergence(**options)(*args), fused_linear_divergence(*args, **options)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ everything at once

SUPPORT = st.one_of(
    st.just({}),
    st.builds(lambda k: {"support": "teacher_top_k", "top_k": k}, st.integers(1, 11)),
    st.builds(lambda k: {"support": "student_top_k", "top_k": k}, st.integers(1, 11)),
    st.builds(lambda b: {"support": "plausible", "plausibility": b}, st.sampled_from([1e-3, 0.1, 1.0])),
)
KIND = st.one_of(
    st.sampled_from([{"divergence": "reverse_kl"}, {"divergence": "forward_kl"}]),
    st.builds(lambda b: {**JSD, "beta": b}, st.sampled_from([0.0, 0.03, 0.5, 0.8, 1.0])),
)
OPTIONAL = st.fixed_dictionaries(
    {},
    optional={
        "clip": st.sampled_from([1e-3, 0.05]),
        "token_clip": st.sampled_from([0.02, 0.5]),
        "temperature": st.sampled_from([0.7, 2.0]),
        "temperature_squared": st.booleans(),
        "student_softcap": st.just(15.0),
        "student_logit_scale": st.just(0.8),
        "vocab_size": st.integers(11, 40),
    },
)


@settings(max_examples=60)
@given(
    SUPPORT,
    KIND,
    OPTIONAL,
    st.sampled_from([TEACHER, STEERED, CONTRASTIVE, {"t": (1.2, 0.9, 20.0), "w": (-0.4, 1.1, None)}]),
    st.sampled_from([FAR, NEAR]),
    st.integers(0, 2**16),
    st.sampled_from([2**30, 2**11]),
)
def test_any_combination(support, kind, optional, compose, gap, seed, workspace_bytes):
    options = {**support, **kind, **optional}
    if options.get("support") == "plausible" and Divergence(**kind).kind == "reverse_kl":
        options.pop("support")
        options.pop("plausibility")
    limit = options.get("vocab_size", 40)
    problem = make_problem(4, 40, 4, 6, gap=gap, bias=True, seed=seed, dtype=torch.float64)
    compare(problem, compose, workspace_bytes=workspace_bytes, target_ids=problem.target_ids % limit, **options)
