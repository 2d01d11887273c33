"""Divergences at the edges: few tokens, masked columns, nearly equal and certain rows, strides."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from divergence_checks import TEACHER, TINY, TRAINED, compare, each, floor_of, on_rows
from divergence_oracle import family_oracle
from loss_checks import strided
from problems import DEVICE, NEAR, assert_gradients_close, evaluate, largest_logit, make_problem, relative_error

from vgs_kernels import PolicyTerm, TargetRow, divergence_loss, fused_linear_divergence

KINDS = {
    "reverse": {},
    "forward": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd"},
    "jsd, clip": {"divergence": "jsd", "clip": 0.01},
    "sampled": {"divergence": "sampled_reverse_kl"},
    "teacher top-k": {"divergence": "jsd", "support": "teacher_top_k", "top_k": 8},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 8},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.01},
}


def to_dtype(backend: str) -> torch.dtype:
    return torch.float64 if backend == "torch" else torch.float32


@each(KINDS, "jsd", "student top-k")
def test_one_token(backend, kind):
    problem = make_problem(1, 57, bias=True, dtype=to_dtype(backend))
    compare(problem, TEACHER, backend=backend, target_ids=problem.target_ids, **KINDS[kind])


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(backend, kind, reduction):
    """Loss 0, or none at all, still connected to every input that requires grad."""
    problem = make_problem(0, 57, bias=True)
    leaves = problem.leaves(TRAINED)
    out = on_rows(fused_linear_divergence, TEACHER)(
        *leaves.args(), **leaves.biases(), reduction=reduction, backend=backend, target_ids=problem.target_ids,
        **KINDS[kind],
    )  # fmt: skip
    out.loss.sum().backward()
    assert out.loss.shape == (() if reduction == "sum" else (0,)) and out.loss.sum() == 0
    assert all(not getattr(leaves, name).grad.any() for name in TRAINED)
    assert out.divergence.shape == out.entropy.shape == out.target_logps.shape == (0,)


@each(KINDS, "jsd")
def test_two_columns_one_dimension(backend, kind):
    problem = make_problem(3, 2, 1, 1, bias=True, dtype=to_dtype(backend))
    options = {**KINDS[kind], **({"top_k": 1} if "top_k" in KINDS[kind] else {})}
    rows = [TargetRow(1.0, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias)]
    args = (problem.student_hidden, problem.student_weight, rows)
    shared = {"student_bias": problem.student_bias, "target_ids": problem.target_ids, **options}
    ours, exact = fused_linear_divergence(*args, backend=backend, **shared), family_oracle(*args, **shared)
    torch.testing.assert_close(ours.divergence, exact.divergence, rtol=1e-4, atol=1e-5)


MASKS = {
    "both": ("student", "teacher"),
    "student alone": ("student",),
    "teacher alone": ("teacher",),
}


@pytest.mark.parametrize("columns", MASKS)
@pytest.mark.parametrize("workspace_bytes", [2**30, 2**11])
@each(["forward", "jsd", "jsd, clip", "reverse"], "jsd, clip")
def test_masked_columns(backend, kind, columns, workspace_bytes):
    """0 * inf is 0; only a KL from what one has and the other excludes is infinite, and a clip bounds that."""
    problem = make_problem(5, 57, bias=True, dtype=to_dtype(backend))
    for name in MASKS[columns]:
        getattr(problem, f"{name}_bias")[[0, 3, 7, 56]] = -math.inf
    options = {"backend": backend, "workspace_bytes": workspace_bytes, **KINDS[kind]}
    infinite = (kind, columns) in (("forward", "student alone"), ("reverse", "teacher alone"))
    if infinite:
        run = on_rows(fused_linear_divergence, TEACHER)
        assert evaluate(run, problem, requires_grad=(), **options).output.divergence.isposinf().all()
        options["clip"] = 0.05
    ours = compare(problem, TEACHER, **options)
    assert all(gradient.isfinite().all() for gradient in ours.gradients.values())


def test_masked_columns_under_caps_and_temperature(backend):
    problem = make_problem(5, 57, bias=True, dtype=to_dtype(backend))
    problem.student_bias[[0, 3, 56]] = problem.teacher_bias[[0, 3, 9, 56]] = -math.inf
    options = {"student_softcap": 15.0, "temperature": 1.4, "target_ids": torch.full((5,), 11, device=DEVICE)}
    compare(problem, {"t": (1.0, 1.0, 20.0)}, backend=backend, divergence="jsd", **options)


@each(["jsd", "student top-k", "teacher top-k", "plausible"], "jsd")
def test_whole_tiles_masked(backend, kind):
    """The first and the last columns all excluded: a running maximum starts at -inf and survives it."""
    problem = make_problem(2, 500, bias=True, dtype=to_dtype(backend))
    for columns in (slice(200), slice(300, None)):
        problem.student_bias[columns] = problem.teacher_bias[columns] = -math.inf
    compare(problem, TEACHER, backend=backend, workspace_bytes=TINY, **KINDS[kind])


@pytest.mark.parametrize("kind", ["reverse", "forward", "jsd", "jsd, clip", "student top-k", "teacher top-k"])
def test_nearly_equal_distributions(kind):
    """A divergence of 1e-9 to 1e-7 is what is left of terms as large as 1: float64 keeps half of its digits."""
    problem = make_problem(9, 257, gap=3e-5, bias=True, dtype=torch.float64)
    exact = evaluate(on_rows(family_oracle, TEACHER), problem, requires_grad=TRAINED, **KINDS[kind])
    assert exact.output.divergence.min() > 1e-13 and exact.output.divergence.max() < 1e-6
    ours = evaluate(on_rows(fused_linear_divergence, TEACHER), problem, requires_grad=TRAINED, **KINDS[kind])
    torch.testing.assert_close(ours.output.divergence, exact.output.divergence, rtol=1e-4, atol=3e-14)
    assert_gradients_close(ours, exact, rtol=1e-8)


@each(["forward", "jsd", "student top-k", "teacher top-k"], "jsd")
def test_nearly_equal_distributions_in_float32(backend, kind):
    """The JSD's terms in p and q nearly cancel, and so do their gradients: as exact as plain float32, and no NaN."""
    problem = make_problem(7, 131, gap=NEAR / 10, bias=True)
    compare(problem, TEACHER, backend=backend, **KINDS[kind])


@each(KINDS, "jsd", "student top-k")
def test_divergence_to_itself_is_zero(backend, kind):
    problem = make_problem(5, 131)
    ours = evaluate(
        on_rows(fused_linear_divergence, {"s": 1.0}),
        problem,
        requires_grad=TRAINED[:2],
        backend=backend,
        target_ids=problem.target_ids,
        **KINDS[kind],
    )
    # plausible: the target is renormalised to fewer entries, which is no divergence of 0
    if kind != "plausible":
        assert ours.output.divergence.abs().max() <= 2 * floor_of(problem, TEACHER, {})
        bound = 1e-6 * largest_logit(problem) * problem.student_weight.abs().max()
        assert ours.gradients["student_hidden"].abs().max() <= bound
    assert ours.output.divergence.isfinite().all()


@each([kind for kind in KINDS if kind != "sampled"], "jsd")
@pytest.mark.parametrize("certain", ["student", "teacher", "both"])
def test_certain_distributions(backend, kind, certain):
    """p = 1 within rounding, other entries underflow: as the oracle says, and gradients of 0 have no noise in them."""
    dtype = to_dtype(backend)
    problem = make_problem(4, 131, dtype=dtype)
    sharp = {
        "student": ("student_hidden",),
        "teacher": ("teacher_hidden",),
        "both": ("student_hidden", "teacher_hidden"),
    }
    problem = replace(problem, **{name: 60 * getattr(problem, name) for name in sharp[certain]})
    compare(problem, TEACHER, backend=backend, requires_grad=(), **KINDS[kind])
    options = {"requires_grad": TRAINED[:2], **KINDS[kind]}
    exact = evaluate(on_rows(family_oracle, TEACHER), problem, dtype=torch.float64, **options)
    ours = evaluate(on_rows(fused_linear_divergence, TEACHER), problem, backend=backend, **options)
    for name, gradient in exact.gradients.items():
        other = problem.student_weight if "hidden" in name else problem.student_hidden
        bound = 4 * torch.finfo(dtype).eps * largest_logit(problem) * other.abs().max()
        assert (ours.gradients[name] - gradient).abs().max() <= bound, name


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("kind", ["jsd", "student top-k", "sampled"])
def test_gradient_only_where_required(kind, name):
    problem = make_problem(5, 57, bias=True, dtype=torch.float64)
    options = {"target_ids": problem.target_ids, **KINDS[kind]}
    ours = compare(problem, TEACHER, requires_grad=[name], **options)
    assert ours.output.loss.requires_grad


def test_nothing_requires_grad():
    problem = make_problem(5, 57, bias=True)
    ours = compare(problem, TEACHER, requires_grad=(), divergence="jsd")
    assert not ours.output.loss.requires_grad


@pytest.mark.parametrize("kind", ["jsd", "teacher top-k", "plausible"])
@pytest.mark.parametrize(
    "restride",
    [
        pytest.param(lambda x: x.mT.contiguous().mT if x.ndim == 2 else x, id="transposed"),
        pytest.param(strided, id="strided"),
    ],
)
def test_non_contiguous_inputs(restride, kind):
    problem = make_problem(5, 57, bias=True)
    options = {**KINDS[kind]}
    expected = evaluate(on_rows(fused_linear_divergence, TEACHER), problem, requires_grad=TRAINED, **options)
    leaves = problem.leaves(TRAINED)
    row = TargetRow(1.0, *(restride(x) for x in (leaves.teacher_hidden, leaves.teacher_weight, leaves.teacher_bias)))
    student = [restride(x) for x in (leaves.student_hidden, leaves.student_weight, leaves.student_bias)]
    assert not student[0].is_contiguous()
    fused_linear_divergence(*student[:2], [row], student_bias=student[2], **options).loss.backward()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(getattr(leaves, name).grad, gradient, rtol=1e-5, atol=1e-7)


def test_expanded_arguments_per_token():
    """Weights, coefficients and advantages that are views of one number."""
    problem = make_problem(5, 57)
    one = torch.full((1,), 0.7, device=DEVICE)
    rows = [(1.0, problem.teacher_hidden, problem.teacher_weight)]

    def call(x):
        policy = PolicyTerm(advantages=x, weights=x)
        rows_ = [*rows, (x, problem.teacher_text_hidden, problem.teacher_weight)]
        return fused_linear_divergence(
            problem.student_hidden, problem.student_weight, rows_, token_weights=x, policy=policy,
            target_ids=problem.target_ids,
        )  # fmt: skip

    torch.testing.assert_close(call(one.expand(5)).loss, call(one.repeat(5)).loss, rtol=1e-6, atol=1e-7)


@each(["jsd", "student top-k", "plausible"], "student top-k")
def test_workspace_of_any_size_gives_the_same(backend, kind):
    problem = make_problem(3, 131, bias=True)
    run = on_rows(fused_linear_divergence, TEACHER)
    options = {"requires_grad": TRAINED, "backend": backend, **KINDS[kind]}
    whole = evaluate(run, problem, **options)
    for size in (1, 2**13):
        cut = evaluate(run, problem, workspace_bytes=size, **options)
        torch.testing.assert_close(cut.output.divergence, whole.output.divergence, rtol=1e-4, atol=1e-5)
        assert_gradients_close(cut, whole, rtol=1e-4)


@each(["jsd", "teacher top-k", "student top-k", "plausible"], "jsd")
def test_padding_is_never_looked_at(backend, kind):
    """Rows beyond ``vocab_size``, a different number in each head, may hold anything."""
    problem = make_problem(5, 57, bias=True)

    def pad(x, rows):
        return torch.cat([x, x.new_full((rows, *x.shape[1:]), math.nan)])

    wide = replace(
        problem,
        student_weight=pad(problem.student_weight, 6), student_bias=pad(problem.student_bias, 6),
        teacher_weight=pad(problem.teacher_weight, 11), teacher_bias=pad(problem.teacher_bias, 11),
    )  # fmt: skip
    run = on_rows(fused_linear_divergence, TEACHER)
    options = {"requires_grad": TRAINED, "backend": backend, **KINDS[kind]}
    expected, ours = evaluate(run, problem, **options), evaluate(run, wide, vocab_size=57, **options)
    torch.testing.assert_close(ours.output.divergence, expected.output.divergence)
    for name, exact in expected.gradients.items():
        gradient = ours.gradients[name]
        assert not gradient[len(exact) :].any(), name
        assert relative_error(gradient[: len(exact)], exact) < 1e-5


def test_a_masked_sample_of_no_weight_adds_nothing(backend):
    """Its log-ratio is infinite, and the head's gradient would spread it to all tokens."""
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 37, device=DEVICE) for _ in range(2))
    student[:, 5] = -torch.inf
    ids, weights = torch.tensor([5, 1, 2], device=DEVICE), torch.tensor([0.0, 1.0, 1.0], device=DEVICE)
    student.requires_grad_()
    out = divergence_loss(
        student,
        [(1.0, teacher)],
        divergence="sampled_reverse_kl",
        target_ids=ids,
        token_weights=weights,
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.isfinite() and student.grad.isfinite().all() and not student.grad[0].any()
    assert student.grad[1:].any()


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_a_tail_lighter_than_any_float32(backend, divergence):
    """The columns outside of the support are together 110 nats below the others: their ratio still counts."""
    torch.manual_seed(0)
    exact = torch.randn(2, 3, 300, dtype=torch.float64, device=DEVICE)
    exact[..., :5] += 120 + torch.randn(2, 3, 5, dtype=torch.float64, device=DEVICE)
    rows = []
    for student, teacher in (exact, exact.float()):
        student = student.clone().requires_grad_()
        options = {} if student.dtype == torch.float64 else {"backend": backend}
        out = divergence_loss(
            student, [(1.0, teacher)], divergence=divergence, support="student_top_k", top_k=5, **options
        )
        out.loss.backward()
        rows.append((out.divergence.double(), student.grad.double()))
    (expected, expected_gradient), (value, gradient) = rows
    assert relative_error(value, expected) < 2e-5
    assert relative_error(gradient, expected_gradient) < 2e-5


def test_a_coefficient_of_zero_wins_over_a_mask(backend):
    torch.manual_seed(0)
    student, teacher, masked = (torch.randn(3, 37, device=DEVICE) for _ in range(3))
    masked[:, 3] = -torch.inf
    options = {"backend": backend}
    plain = divergence_loss(student, [(1.0, teacher)], **options).divergence
    zeros = torch.zeros(3, device=DEVICE)
    for zero in (0.0, zeros):
        with_zero = divergence_loss(student, [(1.0, teacher), (zero, masked)], **options).divergence
        torch.testing.assert_close(with_zero, plain)
    assert divergence_loss(student, [(1.0, teacher), (0.1, masked)], **options).divergence.isinf().all()


@pytest.mark.parametrize("options", [{}, {"divergence": "forward_kl"}, {"divergence": "jsd"}], ids=str)
def test_a_masked_sampled_column_has_no_gradient(backend, options):
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 37, device=DEVICE) for _ in range(2))
    student[:, 5] = teacher[:, 5] = -torch.inf
    student.requires_grad_()
    ones = torch.ones(3, device=DEVICE)
    policy = PolicyTerm(ones, ones)
    ids = torch.tensor([5, 1, 2], device=DEVICE)
    divergence_loss(
        student, [(1.0, teacher)], target_ids=ids, policy=policy, backend=backend, **options
    ).loss.backward()
    assert student.grad.isfinite().all() and not student.grad[:, 5].any() and student.grad[0].any()
