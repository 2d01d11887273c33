"""Loss and per-token terms against the float64 oracle: float32 on both backends, and how they are reported."""

from __future__ import annotations

import pytest
import torch
from covering import on_backends
from loss_checks import GAPS, SIZES
from oracle import vgs_oracle
from problems import (
    DEVICE,
    TERMS,
    assert_terms_close,
    evaluate,
    largest_logit,
    make_problem,
    value_floor,
)

from vgs_kernels import VGSObjective, fused_linear_vgs_loss, vgs_loss


@on_backends(size=SIZES, gap=GAPS)
def test_float32_values(backend, size, gap):
    tokens, vocab = size[backend]
    problem = make_problem(tokens, vocab, gap=gap, bias=True)
    options = {"objective": VGSObjective(), "target_ids": problem.target_ids}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, requires_grad=(), **options)
    ours = evaluate(fused_linear_vgs_loss, problem, requires_grad=(), backend=backend, **options)
    floor = value_floor(problem)
    assert_terms_close(ours.output, exact.output, rtol=1e-5, floor=floor)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=(1 + VGSObjective().gamma) * floor)


@pytest.mark.parametrize("gap", GAPS)
def test_float64_values(gap):
    """Without float32's rounding nothing but the formula is left: every term to 1e-10."""
    problem = make_problem(17, 1000, gap=gap, bias=True, dtype=torch.float64)
    options = {"objective": VGSObjective(), "target_ids": problem.target_ids}
    exact = evaluate(vgs_oracle, problem, requires_grad=(), **options)
    ours = evaluate(fused_linear_vgs_loss, problem, requires_grad=(), backend="torch", **options)
    floor = 1e-9 * torch.finfo(torch.float32).eps * largest_logit(problem)
    assert_terms_close(ours.output, exact.output, rtol=1e-10, floor=max(floor, 1e-12))
    torch.testing.assert_close(ours.loss, exact.loss, rtol=1e-10, atol=1e-12)


def test_student_equal_to_teacher_has_no_standard_term(backend):
    problem = make_problem(7, 257)
    student = problem.args()[:3]
    out = fused_linear_vgs_loss(*student, *student, backend=backend)
    floor = value_floor(problem)
    for name in ("standard", "language"):
        assert getattr(out, name).abs().max() <= floor, name
    torch.testing.assert_close(out.visual, torch.zeros_like(out.visual), rtol=0, atol=floor)  # q* = p_x p_I / p_x = p_I
    torch.testing.assert_close(out.vds, out.student_vds, rtol=1e-5, atol=floor)


def test_terms_are_detached_float32_and_gate_is_bool(backend):
    problem = make_problem(5, 57, dtype=torch.bfloat16)
    problem.student_hidden.requires_grad_()
    out = fused_linear_vgs_loss(*problem.args(), target_ids=problem.target_ids, backend=backend)
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    assert out.loss.dtype == torch.float32
    for name in TERMS:
        term = getattr(out, name)
        assert (term.shape, term.dtype, term.requires_grad) == ((5,), torch.float32, False), name
        assert term.device.type == DEVICE
    assert out.gate.shape == (5,)
    assert out.gate.dtype == torch.bool


def test_target_logps_only_on_request():
    assert fused_linear_vgs_loss(*make_problem(3, 57).args()).target_logps is None


def test_target_ids_in_every_position(backend):
    """Log-probabilities at the first, the last and a block-boundary column."""
    problem = make_problem(6, 257, dtype=torch.float32)
    ids = torch.tensor([0, 256, 255, 128, 127, 64], device=DEVICE)
    out = fused_linear_vgs_loss(*problem.args(), target_ids=ids, backend=backend, workspace_bytes=2**14)
    exact = vgs_oracle(*problem.to(dtype=torch.float64).args(), objective=VGSObjective(), target_ids=ids)
    torch.testing.assert_close(out.target_logps.double(), exact.target_logps, rtol=1e-5, atol=value_floor(problem))


def test_metrics_are_the_means_of_the_terms():
    problem = make_problem(11, 57)
    out = fused_linear_vgs_loss(*problem.args())
    metrics = out.metrics()
    assert set(metrics) == {"loss", "standard", "visual", "language", "vds", "gate", "entropy", "student_vds"}
    for name, value in metrics.items():
        expected = getattr(out, name).detach()
        torch.testing.assert_close(value, expected if name == "loss" else expected.float().mean())
        assert value.shape == ()
        assert not value.requires_grad
    assert metrics["gate"].item() == pytest.approx(3 / 11)  # positions 8, 9, 10 lie strictly above position 7


def test_metrics_of_no_tokens_and_of_a_folded_call_have_no_nan():
    empty = fused_linear_vgs_loss(*make_problem(0, 57).args()).metrics()
    folded = fused_linear_vgs_loss(*make_problem(3, 57).args(), objective=VGSObjective(lam=0.0), return_terms=False)
    for metrics in (empty, folded.metrics()):
        assert "loss" in metrics
        assert all(torch.isfinite(value) for value in metrics.values())


def test_logits_in_equals_fused(backend):
    """``vgs_loss`` on the same logits: values, and gradients pushed through the head by autograd."""
    problem = make_problem(7, 257, bias=True)

    def through_logits(s, a, student, t, w, teacher, *, student_bias, teacher_bias, **options):
        rows = [torch.nn.functional.linear(h, student, student_bias) for h in (s, a)]
        rows += [torch.nn.functional.linear(h, teacher, teacher_bias) for h in (t, w)]
        return vgs_loss(*rows, **options)

    options = {"objective": VGSObjective(eta=0.4), "target_ids": problem.target_ids, "backend": backend}
    dense = evaluate(through_logits, problem, **options)
    fused = evaluate(fused_linear_vgs_loss, problem, **options)
    assert_terms_close(dense.output, fused.output, rtol=1e-5, floor=value_floor(problem))
    torch.testing.assert_close(dense.loss, fused.loss, rtol=1e-5, atol=value_floor(problem))
    for name, gradient in fused.gradients.items():
        torch.testing.assert_close(dense.gradients[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
