"""``divergence_loss``: the family on logits that the caller holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from divergence_checks import each
from divergence_oracle import family_from_logits
from problems import DEVICE, make_problem, relative_error, value_floor

from vgs_kernels import PolicyTerm, divergence_loss, fused_linear_divergence

C = torch.tensor([0.0, 0.5, -0.4, 1.3, 1.0], dtype=torch.float64, device=DEVICE)
KINDS: dict[str, dict[str, Any]] = {
    "reverse": {"temperature": 1.4, "temperature_squared": True},
    "forward": {"divergence": "forward_kl", "clip": 0.03},
    "jsd": {"divergence": "jsd", "beta": 0.3, "token_clip": 0.2},
    "sampled": {"divergence": "sampled_reverse_kl"},
    "teacher top-k": {"divergence": "jsd", "support": "teacher_top_k", "top_k": 9},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 9},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.01},
    "padded": {"divergence": "jsd", "support": "student_top_k", "top_k": 9, "vocab_size": 100},
}


def rows(dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple[Any, torch.Tensor]], torch.Tensor]:
    problem = make_problem(5, 131, bias=True, dtype=torch.float64)
    student = problem.student_hidden @ problem.student_weight.T + problem.student_bias
    teacher, text = (h @ problem.teacher_weight.T for h in (problem.teacher_hidden, problem.teacher_text_hidden))
    target = [(1.0, teacher.to(dtype)), (C, text.to(dtype)), (-C, teacher.to(dtype))]
    return student.to(dtype), target, problem.target_ids % 100


def both(
    dtype: torch.dtype, backend: str, reduction: str | None = None, **options: Any
) -> list[tuple[Any, torch.Tensor]]:
    """Output and gradient of the loss, and of the oracle in float64 on the same numbers."""
    logits, target, ids = rows(dtype)
    leaves = logits.clone().requires_grad_(), logits.double().requires_grad_()
    options |= {"target_ids": ids, "reduction": reduction}
    ours = divergence_loss(leaves[0], target, backend=backend, **options)
    width = options.pop("vocab_size", None)
    exact = family_from_logits(leaves[1][:, :width], [(c, x[:, :width].double()) for c, x in target], **options)
    for output in (ours, exact):
        ((C.to(output.loss.dtype) if reduction == "none" else 1.0) * output.loss).sum().backward()
    return [(ours, leaves[0].grad), (exact, leaves[1].grad)]


@pytest.mark.parametrize("reduction", [None, "none"])
@each(KINDS, "jsd", "student top-k")
def test_equals_the_oracle(backend, kind, reduction):
    dtype = torch.float64 if backend == "torch" else torch.float32
    (ours, gradient), (exact, reference) = both(dtype, backend, reduction, **KINDS[kind])
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if backend == "torch" else {"rtol": 1e-4, "atol": 2e-5}
    for name in ("loss", "divergence", "entropy", "target_logps"):
        torch.testing.assert_close(getattr(ours, name).double(), getattr(exact, name), **tolerance, msg=name)
    assert relative_error(gradient, reference) < tolerance["rtol"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits(dtype, kind):
    """Exact on the 16-bit numbers that came; the gradient is rounded once."""
    (ours, gradient), (exact, reference) = both(dtype, "torch", **KINDS[kind])
    floor = 4 * value_floor(make_problem(5, 131))
    torch.testing.assert_close(ours.divergence.double(), exact.divergence, rtol=1e-4, atol=floor)
    assert gradient.dtype == dtype
    assert relative_error(gradient, reference) < torch.finfo(dtype).eps


def test_policy(backend):
    dtype = torch.float64 if backend == "torch" else torch.float32
    policy = PolicyTerm(*(x.to(dtype) for x in (C, C.abs(), -3 * C.abs())))
    (ours, gradient), (exact, reference) = both(dtype, backend, divergence="jsd", policy=policy)
    tolerance = 1e-9 if backend == "torch" else 1e-4
    torch.testing.assert_close(ours.policy.double(), exact.policy, rtol=tolerance, atol=1e-12)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=tolerance, atol=1e-12)
    assert relative_error(gradient, reference) < tolerance


def test_masked_columns(backend):
    problem = make_problem(3, 57)
    student = problem.student_hidden @ problem.student_weight.T
    teacher = problem.teacher_hidden @ problem.teacher_weight.T
    for x in (student, teacher):
        x[:, [0, 9, 56]] = -torch.inf
    leaves = student.clone().requires_grad_(), student.double().requires_grad_()
    target = [(2.0, teacher), (-1.0, teacher * 0.9)]
    ours = divergence_loss(leaves[0], target, divergence="jsd", backend=backend)
    exact = family_from_logits(leaves[1], [(c, x.double()) for c, x in target], divergence="jsd")
    ours.loss.backward()
    exact.loss.backward()
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-4, atol=1e-5)
    assert relative_error(leaves[0].grad, leaves[1].grad) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    logits = torch.zeros(0, 131, device=DEVICE, requires_grad=True)
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    out = divergence_loss(logits, [(1.0, logits)], target_ids=ids, **KINDS[kind])
    out.loss.backward()
    assert out.loss == 0 and logits.grad.shape == (0, 131)


def test_the_target_gets_no_gradient():
    logits, target, ids = rows(torch.float32)
    leaves = [x.clone().requires_grad_() for x in (logits, target[0][1])]
    divergence_loss(leaves[0], [(1.0, leaves[1]), (0.1, leaves[0])], divergence="jsd", target_ids=ids).loss.backward()
    assert leaves[1].grad is None and leaves[0].grad is not None


def test_equals_the_fused_form():
    problem = make_problem(5, 131, dtype=torch.float64)
    student = problem.student_hidden @ problem.student_weight.T
    teacher = problem.teacher_hidden @ problem.teacher_weight.T
    fused = [(1.2, problem.teacher_hidden, problem.teacher_weight)]
    for options in KINDS.values():
        options = {**options, "target_ids": problem.target_ids % 100}
        ours = divergence_loss(student, [(1.2, teacher)], **options)
        expected = fused_linear_divergence(problem.student_hidden, problem.student_weight, fused, **options)
        torch.testing.assert_close(ours.divergence, expected.divergence, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("message", "target", "options"),
    [
        ("target", [], {}),
        ("target", torch.zeros(5, 57), {}),
        (r"target\[0\]", [torch.zeros(5, 57)], {}),
        (r"target\[0\]\.logits", [(1.0, torch.zeros(4, 57))], {}),
        (r"target\[1\]\.coefficient", [(1.0, torch.zeros(5, 57)), (torch.zeros(4), torch.zeros(5, 57))], {}),
        ("vocab_size", [(1.0, torch.zeros(5, 58))], {}),
        (r"target\[0\]\.logits", [(1.0, torch.zeros(5, 57, dtype=torch.int64))], {}),
        ("top_k .*57.*58", [(1.0, torch.zeros(5, 57))], {"support": "student_top_k", "top_k": 58}),
        ("beta", [(1.0, torch.zeros(5, 57))], {"divergence": "jsd", "beta": 2.0}),
        ("target_ids", [(1.0, torch.zeros(5, 57))], {"divergence": "sampled_reverse_kl"}),
        ("reduction", [(1.0, torch.zeros(5, 57))], {"reduction": "max"}),
    ],
)
def test_errors(message, target, options):
    with pytest.raises((ValueError, TypeError), match=message):
        divergence_loss(torch.zeros(5, 57), target, **options)
