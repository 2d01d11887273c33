"""Inputs that once failed or were silently wrong, and what is right."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from covering import on_backends
from divergence_oracle import family_from_logits
from oracle import vgs_oracle
from problems import DEVICE, TRAINABLE, evaluate, make_problem, relative_error

from vgs_kernels import (
    Head,
    PolicyTerm,
    TargetRow,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)
from vgs_kernels.heads import grouped

SETTING = VGSObjective(lam=0.5)
NOBODY = -100


def padded(problem, rows: int, value: float = 0.0):
    """The problem with ``rows`` more tokens in front, whose states hold ``value``."""

    def pad(x):
        return torch.cat([x.new_full((rows, x.shape[1]), value), x])

    names = ("student_hidden", "student_text_hidden", "teacher_hidden", "teacher_text_hidden")
    ids = torch.cat([problem.target_ids.new_full((rows,), NOBODY), problem.target_ids])
    return replace(problem, **{name: pad(getattr(problem, name)) for name in names}, target_ids=ids)


def teacher_rows(problem):
    return [(1.0, problem.teacher_hidden, problem.teacher_weight)]


# ------------------------------------------------------------------------------------- tokens that do not take part


@on_backends(
    value=[0.0, math.nan, math.inf],
    how=["weight 0", "ignored"],
    setting=[
        pytest.param(SETTING, id="gated"),
        pytest.param(VGSObjective(schedule="adaptive", detach_prior=False, lam=0.5), id="adaptive"),
    ],
)
def test_tokens_that_do_not_take_part(backend, value, how, setting):
    """Padding in front changes no gate, loss or gradient of the others, whatever it holds, and has no gradient."""
    problem = make_problem(7, 57, dtype=torch.float64 if backend == "torch" else torch.float32)
    more = padded(problem, 5, value)
    weights = torch.full((7,), 1 / 7, device=DEVICE, dtype=problem.student_hidden.dtype)
    options = {"objective": setting, "backend": backend}
    plain = evaluate(fused_linear_vgs_loss, problem, token_weights=weights, target_ids=problem.target_ids, **options)
    if how == "ignored":
        ours = evaluate(fused_linear_vgs_loss, more, target_ids=more.target_ids, **options)
        assert not ours.output.standard[:5].any() and not ours.output.target_logps[:5].any()
    else:
        ours = evaluate(fused_linear_vgs_loss, more, token_weights=torch.cat([0 * weights[:5], weights]), **options)
    close = {"rtol": 1e-9, "atol": 1e-12} if backend == "torch" else {"rtol": 1e-4, "atol": 1e-6}
    assert torch.equal(ours.output.gate[5:], plain.output.gate) and not ours.output.gate[:5].any()
    torch.testing.assert_close(ours.loss, plain.loss, **close)
    for name, gradient in plain.gradients.items():
        got = ours.gradients[name]
        assert got.isfinite().all()
        if "hidden" in name:
            assert not got[:5].any()
            got = got[5:]
        torch.testing.assert_close(got, gradient, **close)
    for name, mean in plain.output.metrics().items():
        torch.testing.assert_close(ours.output.metrics()[name], mean, check_dtype=False, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"divergence": "jsd"}, {"support": "student_top_k", "top_k": 5}], ids=str)
def test_ignored_tokens_of_a_divergence(backend, options):
    problem = make_problem(4, 57)
    more = padded(problem, 3, math.nan)
    hidden = more.student_hidden.clone().requires_grad_()
    head = more.student_weight.clone().requires_grad_()
    rows = teacher_rows(more)
    out = fused_linear_divergence(hidden, head, rows, target_ids=more.target_ids, backend=backend, **options)
    out.loss.backward()
    args = (problem.student_hidden, problem.student_weight, teacher_rows(problem))
    torch.testing.assert_close(out.loss, fused_linear_divergence(*args, backend=backend, **options).loss)
    assert not out.divergence[:3].any() and head.grad.isfinite().all() and not hidden.grad[:3].any()


def test_ignored_rows_of_logits(backend):
    torch.manual_seed(0)
    four = [torch.randn(6, 37, device=DEVICE) for _ in range(4)]
    ids = torch.tensor([NOBODY, 1, 2, NOBODY, 4, 5], device=DEVICE)
    kept = [1, 2, 4, 5]
    expected = vgs_loss(*(x[kept] for x in four), objective=SETTING, backend=backend)
    for x in four:
        x[[0, 3]] = math.nan
    four[0].requires_grad_()
    out = vgs_loss(*four, objective=SETTING, target_ids=ids, backend=backend)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    assert four[0].grad.isfinite().all() and not four[0].grad[[0, 3]].any()


def test_another_ignore_index_and_none_left():
    problem = make_problem(3, 57)
    ids = torch.full_like(problem.target_ids, 7)
    for options in ({}, {"objective": VGSObjective(lam=0.0), "return_terms": False}):
        ours = evaluate(
            fused_linear_vgs_loss, problem, target_ids=ids, ignore_index=7, requires_grad=TRAINABLE[:1], **options
        )
        assert ours.loss == 0 and not ours.gradients["student_hidden"].any()
    with pytest.raises(ValueError, match=r"target_ids must lie in \[0, 57\)"):
        fused_linear_vgs_loss(*problem.args(), target_ids=torch.full_like(ids, NOBODY), ignore_index=7)


def test_a_policy_counts_where_the_divergence_does_not():
    """Weights of 0 for the divergence alone: the policy's gradient is there."""
    problem = make_problem(3, 57)
    hidden = problem.student_hidden.clone().requires_grad_()
    zeros, ones = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    policy = PolicyTerm(ones, ones)
    args = (hidden, problem.student_weight, teacher_rows(problem))
    fused_linear_divergence(*args, token_weights=zeros, target_ids=problem.target_ids, policy=policy).loss.backward()
    assert hidden.grad.any(dim=1).all()


# ------------------------------------------------------------------------------------------------ shapes and arguments


def test_reductions_and_leading_dimensions():
    problem = make_problem(6, 57, dtype=torch.float64)
    shaped = [x.reshape(2, 3, -1) if x.shape[0] == 6 else x for x in problem.args()]
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64, device=DEVICE)
    for run in (
        lambda args, **options: fused_linear_vgs_loss(*args, objective=SETTING, **options),
        lambda args, **options: fused_linear_divergence(args[0], args[2], [(1.0, args[3], args[5])], **options),
    ):
        flat = run(problem.args(), reduction="none")
        out = run(shaped, reduction="none", token_weights=weights.reshape(2, 3))
        assert out.loss.shape == out.entropy.shape == (2, 3)
        torch.testing.assert_close(out.loss.flatten(), weights * flat.loss)
        torch.testing.assert_close(run(shaped, reduction="sum").loss, flat.loss.sum())
        for options in ({}, {"reduction": "mean"}):
            torch.testing.assert_close(run(shaped, **options).loss, flat.loss.mean())
        mean = run(shaped, reduction="mean", token_weights=weights.reshape(2, 3)).loss
        torch.testing.assert_close(mean, (weights * flat.loss).sum() / weights.sum())
        given = run(shaped, token_weights=weights.reshape(2, 3)).loss
        torch.testing.assert_close(given, (weights * flat.loss).sum())


def test_any_upstream_gradient_of_the_vgs_loss():
    """Values with a graph: a token whose upstream gradient is 0 still counts in the quantile."""
    problem = make_problem(7, 57, dtype=torch.float64)
    upstream = torch.tensor([0.0, 1.0, -2.0, 0.0, 3.0, 0.5, 1.0], dtype=torch.float64, device=DEVICE)
    leaves, twin = problem.leaves(), problem.leaves()
    (upstream * fused_linear_vgs_loss(*leaves.args(), objective=SETTING, reduction="none").loss).sum().backward()
    vds = fused_linear_vgs_loss(*problem.args(), objective=SETTING).vds
    limit = float(torch.quantile(vds, 0.7))
    vgs_oracle(*twin.args(), objective=SETTING, token_weights=upstream, vds_threshold=limit).loss.backward()
    for name in TRAINABLE[:3]:
        assert relative_error(getattr(leaves, name).grad, getattr(twin, name).grad) < 1e-9, name


def test_a_head_stands_for_its_parts():
    problem = make_problem(5, 57, bias=True)
    student = Head(problem.student_weight, problem.student_bias, 0.8, 15.0)
    teacher = Head(problem.teacher_weight, problem.teacher_bias, 1.2)
    loose = {"student_logit_scale": 0.8, "student_softcap": 15.0, "teacher_logit_scale": 1.2, **problem.biases()}
    expected = fused_linear_vgs_loss(*problem.args(), objective=SETTING, **loose).loss
    h, a, _, t, w, _ = problem.args()
    assert fused_linear_vgs_loss(h, a, student, t, w, teacher, objective=SETTING).loss == expected
    row = (1.0, t, problem.teacher_weight, problem.teacher_bias, 1.2)
    ours = fused_linear_divergence(h, student, [(1.0, t, teacher)]).loss
    options = {"student_bias": problem.student_bias, "student_logit_scale": 0.8, "student_softcap": 15.0}
    assert ours == fused_linear_divergence(h, problem.student_weight, [row], **options).loss
    with pytest.raises(ValueError, match=r"student_weight is a Head.* bias"):
        fused_linear_divergence(h, student, [row], student_bias=problem.student_bias)


def test_heads_without_columns_are_not_one_head():
    """Every rank of a vocabulary group groups its rows alike, also one that holds no column."""
    empty = [Head(torch.empty(0, 8)) for _ in range(2)]
    rows = [TargetRow(1.0, torch.zeros(3, 8), head) for head in (*empty, empty[0])]
    assert [len(group) for group in grouped(rows, True)] == [2, 1]


STUDENT_STATES, TEACHER_STATES = (
    {f"{model}_hidden": torch.bfloat16, f"{model}_text_hidden": torch.bfloat16} for model in ("student", "teacher")
)
MIXED = {
    "bfloat16 teacher": {**TEACHER_STATES, "teacher_weight": torch.bfloat16},
    "float32 heads": {**STUDENT_STATES, **TEACHER_STATES},
    "float64 teacher": {"teacher_hidden": torch.float64, "teacher_weight": torch.float64},
    "bfloat16 bias": {"student_bias": torch.bfloat16, "teacher_text_hidden": torch.float16},
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [*(("torch", name) for name in MIXED), ("triton", "float32 heads"), ("triton", "bfloat16 bias")],
    indirect=["backend"],
)
def test_inputs_of_different_dtypes(backend, name):
    """Each is rounded as it came, and everything is computed in float32."""
    problem = make_problem(5, 57, bias=True)
    mixed = replace(problem, **{key: getattr(problem, key).to(dtype) for key, dtype in MIXED[name].items()})
    exact = evaluate(vgs_oracle, mixed, dtype=torch.float64, objective=SETTING)
    ours = evaluate(fused_linear_vgs_loss, mixed, objective=SETTING, backend=backend)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    for key, gradient in ours.gradients.items():
        assert gradient.dtype == getattr(mixed, key).dtype
        bound = 2e-5 if gradient.dtype == torch.float32 else 4e-3  # two gated tokens with little language to learn
        assert relative_error(gradient, exact.gradients[key]) < bound, key
    rows = [TargetRow(1.0, mixed.teacher_hidden, mixed.teacher_weight)]
    assert fused_linear_divergence(mixed.student_hidden, mixed.student_weight, rows).loss.isfinite()


# ----------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_tail_far_below(backend, divergence):
    """The tail's columns have no p in float32; together they still take the gradient of the tail."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 40, dtype=torch.float64, device=DEVICE)
    student[:, :5] += 95
    gradients = []
    for dtype in (torch.float64, torch.float32):
        logits = student.to(dtype, copy=True).requires_grad_()
        options = {"divergence": divergence, "support": "student_top_k", "top_k": 5}
        if dtype == torch.float64:
            family_from_logits(logits, [(1.0, teacher)], **options).loss.backward()
        else:
            divergence_loss(logits, [(1.0, teacher.float())], backend=backend, **options).loss.backward()
        gradients.append(logits.grad.double())
    assert relative_error(gradients[1], gradients[0]) < 1e-4
    tails = [gradient[:, 5:].sum(1) for gradient in gradients]
    torch.testing.assert_close(tails[1], tails[0], rtol=1e-4, atol=1e-7)
    assert divergence != "forward_kl" or (tails[0] < -0.2).all()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_saturated_rows(backend, divergence):
    """p = 1 within rounding, the teacher elsewhere: the gradient is that of what is left, not rounding."""
    torch.manual_seed(0)
    student, teacher = 30 * torch.rand(2, 4, 64, dtype=torch.float64, device=DEVICE)
    student[:, 3] = 32
    gradients = []
    for dtype in (torch.float64, torch.float32):
        logits = student.float().to(dtype).requires_grad_()
        options = {"divergence": divergence, "temperature": 0.05}
        function = family_from_logits if dtype == torch.float64 else divergence_loss
        named = {} if dtype == torch.float64 else {"backend": backend}
        function(logits, [(1.0, teacher.float().to(dtype))], **options, **named).loss.backward()
        gradients.append(logits.grad.double())
    assert (gradients[1] - gradients[0]).abs().max() < (1e-10 if divergence == "reverse_kl" else 1e-5)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_values_near_equality(backend, divergence):
    """A divergence of 1e-6 nats is right to a thousandth, of which plain float32 leaves one digit at most."""
    torch.manual_seed(0)
    student = 4 * torch.randn(5, 300, device=DEVICE)
    teacher = student + 1.5e-3 * torch.randn(5, 300, device=DEVICE)
    exact = family_from_logits(student.double(), [(1.0, teacher.double())], divergence=divergence).divergence
    assert exact.min() > 1e-8 and exact.max() < 5e-6
    ours = divergence_loss(student, [(1.0, teacher)], divergence=divergence, backend=backend).divergence
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.bfloat16), ("torch", torch.float16), ("triton", torch.float16)],
    indirect=["backend"],
)
def test_gradients_of_16_bit_logits_are_rounded_once(backend, dtype):
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 33, 500, device=DEVICE)
    student, teacher = (x.to(dtype) for x in (student, teacher))
    gradients = []
    for x in (student.double(), student):
        leaf = x.clone().requires_grad_()
        function = family_from_logits if x is not student else divergence_loss
        named = {"backend": backend} if x is student else {}
        function(leaf, [(1.0, teacher.to(x.dtype))], divergence="jsd", **named).loss.backward()
        gradients.append(leaf.grad)
    once = relative_error(gradients[0].to(dtype), gradients[0])
    assert relative_error(gradients[1], gradients[0]) < 1.1 * once
