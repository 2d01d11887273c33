"""No tensor of N * V elements, and no more memory than the workspace beside the gradients: counted, not timed."""

import pytest
import torch
from allocations import AllocationMeter

from benchmarks.problem import Problem, Shape, make_problem
from vgs_kernels import VGSObjective, fused_linear_divergence, fused_linear_vgs_loss, operators
from vgs_kernels.active_columns import active_columns, row_sums, temporary_bytes
from vgs_kernels.gradients import _Products
from vgs_kernels.plan import Plan, pitch

N, V, D = 1024, 4096, 32


@pytest.fixture
def problem(monkeypatch) -> Problem:
    # A registered operator hides its body from a dispatch mode: call the body itself.
    monkeypatch.setattr(operators, "loss", torch.no_grad()(operators.run))
    return make_problem(Shape(V, D, D), N, torch.float32, "cpu")


def leaves(problem: Problem) -> list[torch.Tensor]:
    x = problem.leaves(("student", "student_text", "student_weight"))
    return [x.student, x.student_text, x.student_weight, x.teacher, x.teacher_text, x.teacher_weight]


OBJECTIVES = {
    "default": VGSObjective(),
    "no language term": VGSObjective(lam=0.0),
    "adaptive": VGSObjective(schedule="adaptive"),
    "live prior": VGSObjective(detach_prior=False),
}
#: Of the small ones each has hundreds of tiles: the objective with the most phases stands for the others.
QUICK = [("adaptive", 2**16), ("adaptive", 2**20), ("live prior", 2**20), *((name, 2**24) for name in OBJECTIVES)]


@pytest.mark.parametrize(
    ("name", "workspace"),
    [
        pytest.param(name, size, marks=() if (name, size) in QUICK else pytest.mark.slow)
        for name in OBJECTIVES
        for size in (2**16, 2**20, 2**24)
    ],
)
def test_vgs_stays_within_its_workspace(problem, name, workspace):
    objective = OBJECTIVES[name]
    with AllocationMeter() as meter:
        fused_linear_vgs_loss(*leaves(problem), objective=objective, workspace_bytes=workspace)
    gradients = 4 * (2 * N * D + V * D)
    scratch = 4 * 64 * V * 10  # the torch backend's temporaries: less than the largest workspace
    assert meter.largest < 4 * N * V
    assert meter.peak <= workspace + gradients + scratch + 400 * N


def test_a_later_phase_finds_the_memory_of_the_first(monkeypatch, problem):
    """Loops in C have no temporaries; gated tokens of a first sweep are projected again, in as large tiles."""
    monkeypatch.setattr(operators, "synchronising_loss", operators.loss)
    options = {"objective": VGSObjective(vds_scope="trajectory"), "trajectory_ids": torch.arange(N) // 50}
    with AllocationMeter() as meter:
        fused_linear_vgs_loss(*leaves(problem), **options, workspace_bytes=2**23, backend="loops")
    assert 0.9 * 2**23 <= meter.peak - 4 * (2 * N * D + V * D) <= 1.15 * 2**23


def test_folded_and_plain_divergence_stay_within_their_workspace(problem):
    s, a, ws, t, w, wt = leaves(problem)
    with AllocationMeter() as meter:
        fused_linear_vgs_loss(
            s, a, ws, t, w, wt, objective=VGSObjective(lam=0.0), return_terms=False, workspace_bytes=2**20
        )
        fused_linear_divergence(s, ws, [(1.0, t, wt)], workspace_bytes=2**20)
    assert meter.largest < 4 * N * V // 8


def test_a_frozen_head_costs_no_gradient(problem):
    peaks = {}
    for frozen in (False, True):
        arguments = leaves(problem)
        arguments[2].requires_grad_(not frozen)
        with AllocationMeter() as meter:
            fused_linear_vgs_loss(*arguments, workspace_bytes=2**20)
        peaks[frozen] = meter.peak
    assert peaks[False] - peaks[True] >= 4 * V * D


@pytest.mark.parametrize("keep", [False, True])
def test_backward_scales_the_gradients_in_place_unless_the_graph_is_kept(keep):
    problem = make_problem(Shape(V, D, D), 64, torch.float32, "cpu")
    loss = fused_linear_vgs_loss(*leaves(problem)).loss
    with AllocationMeter() as meter:
        loss.backward(retain_graph=keep)
    assert (meter.peak >= 4 * V * D) == keep


def test_the_meter_sees_dense_logits(problem):
    with AllocationMeter() as meter:
        torch.mm(problem.student, problem.student_weight.T)
    assert meter.largest == 4 * N * V


@pytest.mark.parametrize("failing", [False, True], ids=["sure", "guessed wrongly"])
def test_temporaries_of_a_tolerance_are_counted(failing):
    """To a fifth, where three in ten columns are needed; also where thresholds must be lowered, for half of the rows
    have a twentieth of their mass in columns that no sample looks at."""
    rows, columns, width = 64, 50_000, 64
    torch.manual_seed(0)
    block = torch.rand(rows, columns) * 1e-6
    block[:, torch.arange(columns) % 10 < 3] += 1e-3
    if failing:
        place = torch.arange(columns) % 1024
        block[: rows // 2, (place >= 64) & (place < 220)] += 1e-4
    weight, hidden, d_hidden, d_weight = (torch.zeros(x, width) for x in (columns, rows, rows, columns))
    products = _Products(weight, hidden, d_hidden, d_weight, 1.0, False, False)
    with AllocationMeter() as meter:
        active = active_columns(block, row_sums(block)[0], 0.02)
        products.add_columns(block, active, row_sums)
    bound = temporary_bytes(rows, columns, width, torch.float32, "cpu")
    assert 0.8 * bound <= meter.peak <= bound
    assert 0.25 * columns < len(active) < 0.5 * columns


@pytest.mark.parametrize(("n", "workspace"), [(0, 2**20), (1, 2**20), (7, 1), (3000, 2**24), (100_000, 2**30)])
@pytest.mark.parametrize("gradient_bytes", [0, 2, 4])
@pytest.mark.parametrize("vocab", [100, 4096, 151_936])
def test_plan_fits(n, workspace, gradient_bytes, vocab):
    plan = Plan.fit(n, vocab, 16, gradient_bytes, workspace)
    assert 1 <= plan.rows <= plan.gradient_rows <= max(n, 1)
    assert 1 <= plan.columns <= vocab
    used = pitch(plan.columns) * (plan.rows * 16 + plan.gradient_rows * gradient_bytes)
    assert used <= max(workspace, 128 * 128 * (16 + gradient_bytes))
    assert plan.gradient_rows == n or plan.gradient_rows % plan.rows == 0
