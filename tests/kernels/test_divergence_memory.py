"""No divergence forms an [N, V] tensor, or takes more than its workspace beside the gradients: counted, not timed."""

from __future__ import annotations

import pytest
import torch
from allocations import AllocationMeter

from benchmarks.problem import Problem, Shape, make_problem
from vgs_kernels import PolicyTerm, fused_linear_divergence, operators

V, D = 1024, 16
SCRATCH = 4 * 64 * V * 10  # the PyTorch rows' temporaries
KINDS = {
    "forward": {"divergence": "forward_kl"},
    "jsd": {"divergence": "jsd", "clip": 0.05},
    "teacher top-k": {"divergence": "jsd", "support": "teacher_top_k", "top_k": 256},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 100},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.1},
    "sampled": {"divergence": "sampled_reverse_kl"},
}


@pytest.fixture(autouse=True)
def bodies(monkeypatch) -> None:
    """A registered operator hides its body from a dispatch mode: call the body itself."""
    monkeypatch.setattr(operators, "loss", torch.no_grad()(operators.run))


def problem_of(tokens: int) -> Problem:
    return make_problem(Shape(V, D, D), tokens, torch.float32, "cpu")


def measure(tokens: int, workspace: int, rows: int = 1, folded: bool = False, **options) -> AllocationMeter:
    x = problem_of(tokens).leaves(("student", "student_weight"))
    other = x.teacher_weight if folded else x.teacher_weight.clone()
    target = [(1.0, x.teacher, x.teacher_weight), (-0.5, x.teacher_text, other)][:rows]
    options["target_ids"] = torch.arange(tokens) % V
    with AllocationMeter() as meter:
        fused_linear_divergence(x.student, x.student_weight, target, workspace_bytes=workspace, **options)
    return meter


def bound(tokens: int, workspace: int, k: int = 0) -> int:
    """Workspace, gradients, a few rows of statistics for each token, and its k greatest entries."""
    return workspace + 4 * (tokens * D + V * D) + SCRATCH + tokens * (600 + 40 * k)


@pytest.mark.parametrize("kind", KINDS)
def test_stays_within_its_workspace(kind):
    tokens, workspace = 512, 2**17
    meter = measure(tokens, workspace, rows=2, **KINDS[kind])
    assert meter.largest < 4 * tokens * V // 2
    assert meter.peak <= bound(tokens, workspace, KINDS[kind].get("top_k", 0))


@pytest.mark.slow
def test_rows_of_one_head_are_combined_tile_by_tile():
    """And not before, for all tokens at once."""
    tokens, workspace = 4096, 2**17
    apart, folded = (measure(tokens, workspace, rows=2, folded=folded).peak for folded in (False, True))
    assert folded < apart + 4 * tokens * D // 2


@pytest.mark.parametrize("kind", ["jsd", "teacher top-k", "student top-k", "plausible"])
def test_scratch_does_not_grow_with_the_tokens(kind):
    """Beside what a token has of its own: hidden states, statistics, its k greatest entries."""
    workspace = 2**18
    few, many = (measure(tokens, workspace, **KINDS[kind]).peak for tokens in (128, 384))
    assert many - few <= 256 * (4 * D + 600 + 40 * KINDS[kind].get("top_k", 0))


def test_policy_is_free():
    tokens = 256
    x = torch.ones(tokens)
    without = measure(tokens, 2**20, divergence="jsd").peak
    assert measure(tokens, 2**20, divergence="jsd", policy=PolicyTerm(x, x, -x)).peak - without <= 200 * tokens


def test_the_meter_sees_dense_logits():
    x = problem_of(64)
    with AllocationMeter() as meter:
        (x.student @ x.student_weight.T).softmax(-1)
    assert meter.peak >= 2 * 4 * 64 * V
