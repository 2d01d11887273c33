"""Every wrong input raises ValueError or TypeError that names the argument."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import DEVICE, INPUTS, make_problem

from vgs_kernels import VGSObjective, fused_linear_divergence, fused_linear_vgs_loss, vgs_loss

ERRORS = (ValueError, TypeError)


@pytest.fixture(scope="module")
def problem():
    return make_problem(5, 57, 6, 8, bias=True)


def loss(problem, changes):
    inputs = {name: changes.get(name, getattr(problem, name)) for name in INPUTS}
    options = {name: value for name, value in changes.items() if name not in INPUTS}
    return fused_linear_vgs_loss(*inputs.values(), **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", -0.1),
        ("gamma", math.nan),
        ("gamma", math.inf),
        ("gamma", "2"),
        ("lam", -1e-9),
        ("lam", math.nan),
        ("vds_quantile", -0.01),
        ("vds_quantile", 1.01),
        ("vds_quantile", math.nan),
        ("adaptive_quantile", 2.0),
        ("eta", -1.0),
        ("eta", math.nan),
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("detach_prior", "yes"),
        ("schedule", "linear"),
        ("vds_scope", "batch"),
        ("divergence", "forward_kl"),
    ],
)
def test_objective(name, value):
    with pytest.raises(ERRORS, match=name):
        VGSObjective(**{name: value})


def test_adaptive_quantile_above_the_upper_one():
    with pytest.raises(ValueError, match="adaptive_quantile"):
        VGSObjective(schedule="adaptive", adaptive_quantile=0.8, vds_quantile=0.7)


def test_objective_is_immutable():
    with pytest.raises(AttributeError):
        VGSObjective().gamma = 1.0


def zeros(*shape, dtype=torch.float32, device=DEVICE):
    return torch.zeros(*shape, dtype=dtype, device=device)


ids = zeros(5, dtype=torch.int64)

WRONG = {
    # what is wrong: (argument named in the message, changes)
    "rank of hidden": ("student_hidden", {"student_hidden": zeros(6)}),
    "leading dimensions of hidden": ("student_text_hidden", {"student_hidden": zeros(1, 5, 6)}),
    "rank of text hidden": ("student_text_hidden", {"student_text_hidden": zeros(6)}),
    "rank of weight": ("student_weight", {"student_weight": zeros(57)}),
    "rank of teacher hidden": ("teacher_hidden", {"teacher_hidden": zeros(1, 5, 8)}),
    "rank of teacher weight": ("teacher_weight", {"teacher_weight": zeros(1, 57, 8)}),
    "tokens of text hidden": ("student_text_hidden", {"student_text_hidden": zeros(4, 6)}),
    "tokens of teacher hidden": ("teacher_hidden", {"teacher_hidden": zeros(6, 8)}),
    "tokens of teacher text hidden": ("teacher_text_hidden", {"teacher_text_hidden": zeros(1, 8)}),
    "hidden size of text hidden": ("student_text_hidden", {"student_text_hidden": zeros(5, 7)}),
    "hidden size of the student head": ("student_weight", {"student_weight": zeros(57, 7)}),
    "hidden size of the teacher head": ("teacher_weight", {"teacher_weight": zeros(57, 6)}),
    "hidden size of teacher text hidden": ("teacher_text_hidden", {"teacher_text_hidden": zeros(5, 6)}),
    "vocabulary": ("teacher_weight", {"teacher_weight": zeros(58, 8)}),
    "vocabulary, hint": ("vocab_size", {"teacher_weight": zeros(58, 8)}),
    "empty head": ("student_weight", {"student_weight": zeros(0, 6)}),
    "empty teacher head": ("teacher_weight", {"teacher_weight": zeros(0, 8)}),
    "flattened shard of a head": ("student_weight", {"student_weight": zeros(0)}),
    "integer hidden": ("student_hidden", {"student_hidden": zeros(5, 6, dtype=torch.int64)}),
    "integer weight": ("teacher_weight", {"teacher_weight": zeros(57, 8, dtype=torch.int32)}),
    "hidden not a tensor": ("student_hidden", {"student_hidden": [[0.0] * 6] * 5}),
    "weight missing": ("teacher_weight", {"teacher_weight": None}),
    "device of hidden": ("teacher_hidden", {"teacher_hidden": zeros(5, 8, device="meta")}),
    "device of weight": ("student_weight", {"student_weight": zeros(57, 6, device="meta")}),
    "device of token weights": ("token_weights", {"token_weights": zeros(5, device="meta")}),
    "shape of bias": ("student_bias", {"student_bias": zeros(56)}),
    "rank of bias": ("teacher_bias", {"teacher_bias": zeros(57, 1)}),
    "dtype of bias": ("teacher_bias", {"teacher_bias": zeros(57, dtype=torch.int64)}),
    "shape of token weights": ("token_weights", {"token_weights": zeros(4)}),
    "rank of token weights": ("token_weights", {"token_weights": zeros(5, 1)}),
    "dtype of token weights": ("token_weights", {"token_weights": ids}),
    "token weights not a tensor": ("token_weights", {"token_weights": [0.2] * 5}),
    "shape of target ids": ("target_ids", {"target_ids": ids[:4]}),
    "dtype of target ids": ("target_ids", {"target_ids": zeros(5)}),
    "shape of vds": ("vds", {"vds": zeros(3)}),
    "dtype of vds": ("vds", {"vds": ids}),
    "threshold not a number": ("vds_threshold", {"vds_threshold": "high"}),
    "threshold per token": ("vds_threshold", {"vds_threshold": zeros(5)}),
    "two thresholds for a constant schedule": ("vds_threshold", {"vds_threshold": (0.1, 0.2)}),
    "threshold NaN": ("vds_threshold", {"vds_threshold": math.nan}),
    "one threshold for the adaptive schedule": (
        "vds_threshold",
        {"vds_threshold": 0.1, "objective": VGSObjective(schedule="adaptive")},
    ),
    "three thresholds": (
        "vds_threshold",
        {"vds_threshold": (0.1, 0.2, 0.3), "objective": VGSObjective(schedule="adaptive")},
    ),
    "thresholds in the wrong order": (
        "vds_threshold",
        {"vds_threshold": (0.2, 0.1), "objective": VGSObjective(schedule="adaptive")},
    ),
    "trajectory scope without ids": ("trajectory_ids", {"objective": VGSObjective(vds_scope="trajectory")}),
    "shape of trajectory ids": (
        "trajectory_ids",
        {"objective": VGSObjective(vds_scope="trajectory"), "trajectory_ids": ids[:2]},
    ),
    "dtype of trajectory ids": (
        "trajectory_ids",
        {"objective": VGSObjective(vds_scope="trajectory"), "trajectory_ids": zeros(5)},
    ),
    "vocab_size above the head": ("vocab_size", {"vocab_size": 58}),
    "vocab_size 0": ("vocab_size", {"vocab_size": 0}),
    "vocab_size not an integer": ("vocab_size", {"vocab_size": 10.5}),
    "softcap 0": ("student_softcap", {"student_softcap": 0.0}),
    "softcap negative": ("teacher_softcap", {"teacher_softcap": -1.0}),
    "scale infinite": ("student_logit_scale", {"student_logit_scale": math.inf}),
    "scale NaN": ("teacher_logit_scale", {"teacher_logit_scale": math.nan}),
    "workspace 0": ("workspace_bytes", {"workspace_bytes": 0}),
    "workspace negative": ("workspace_bytes", {"workspace_bytes": -5}),
    "unknown backend": ("backend", {"backend": "cuda"}),
    "objective as a dict": ("objective", {"objective": {"gamma": 2.0}}),
}


@pytest.mark.parametrize("what", WRONG)
def test_fused_loss(problem, what):
    argument, changes = WRONG[what]
    with pytest.raises(ERRORS, match=argument):
        loss(problem, changes)


def test_errors_say_what_came_and_what_was_expected(problem):
    with pytest.raises(ValueError, match=r"(?s)58.*57|57.*58"):
        loss(problem, {"teacher_weight": zeros(58, 8)})
    with pytest.raises(ValueError, match=r"(?s)6.*7|7.*6"):
        loss(problem, {"student_weight": zeros(57, 7)})


def test_errors_come_also_without_tokens():
    """A rank without tokens must not hide a mistake that the others report (or hang where they raise)."""
    empty = make_problem(0, 57, 6, 8)
    with pytest.raises(ERRORS, match="teacher_weight"):
        loss(empty, {"teacher_weight": zeros(58, 8)})
    with pytest.raises(ERRORS, match="trajectory_ids"):
        loss(empty, {"objective": VGSObjective(vds_scope="trajectory")})


def test_float64_in_triton_is_refused(problem):
    pytest.importorskip("triton")
    with pytest.raises(ERRORS, match="float64"):
        fused_linear_vgs_loss(*problem.to(dtype=torch.float64).args(), backend="triton")


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["student_weight", "teacher_weight"])
def test_sharded_head(mesh, name):
    from torch.distributed.tensor import distribute_tensor

    problem = make_problem(5, 57, 6, 8, device="cpu")
    sharded = distribute_tensor(getattr(problem, name), mesh)
    with pytest.raises(ERRORS, match=f"(?s){name}.*full_tensor"):
        loss(problem, {name: sharded})


def rows(problem):
    student, teacher = problem.student_weight.T, problem.teacher_weight.T
    return {
        "student_logits": problem.student_hidden @ student,
        "student_text_logits": problem.student_text_hidden @ student,
        "teacher_logits": problem.teacher_hidden @ teacher,
        "teacher_text_logits": problem.teacher_text_hidden @ teacher,
    }


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("student_text_logits", {"student_text_logits": zeros(4, 57)}),
        ("teacher_logits", {"teacher_logits": zeros(5, 58), "teacher_text_logits": zeros(5, 58)}),
        ("teacher_text_logits", {"teacher_text_logits": zeros(5, 56)}),
        ("student_logits", {"student_logits": zeros(57)}),
        ("student_logits", {"student_logits": zeros(5, 57, dtype=torch.int64)}),
        ("teacher_logits", {"teacher_logits": zeros(5, 57, device="meta")}),
        ("token_weights", {"token_weights": zeros(6)}),
        ("target_ids", {"target_ids": zeros(5)}),
        ("vocab_size", {"vocab_size": 58}),
        ("backend", {"backend": "numpy"}),
        ("trajectory_ids", {"objective": VGSObjective(vds_scope="trajectory")}),
    ],
)
def test_logits_in(problem, argument, changes):
    values = rows(problem)
    inputs = [changes.get(name, value) for name, value in values.items()]
    options = {name: value for name, value in changes.items() if name not in values}
    with pytest.raises(ERRORS, match=argument):
        vgs_loss(*inputs, **options)


def target(problem, *, coefficient=1.0, hidden=None, weight=None):
    hidden = problem.teacher_hidden if hidden is None else hidden
    return [(coefficient, hidden, problem.teacher_weight if weight is None else weight)]


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("target", {"target": lambda p: []}),
        ("target", {"target": lambda p: [(1.0, p.teacher_hidden)]}),
        ("target", {"target": lambda p: target(p, coefficient=math.nan)}),
        ("target", {"target": lambda p: target(p, coefficient=math.inf)}),
        ("target", {"target": lambda p: target(p, coefficient="1")}),
        ("target", {"target": lambda p: target(p, hidden=zeros(4, 8))}),
        ("target", {"target": lambda p: target(p, weight=zeros(57, 7))}),
        ("target", {"target": lambda p: target(p, weight=zeros(58, 8))}),
        ("target", {"target": lambda p: target(p, weight=zeros(0, 8))}),
        ("student_hidden", {"student_hidden": lambda p: zeros(6)}),
        ("student_weight", {"student_weight": lambda p: zeros(57, 5)}),
        ("student_bias", {"student_bias": lambda p: zeros(3)}),
        ("divergence", {"divergence": lambda p: "kl"}),
        ("temperature", {"temperature": lambda p: 0.0}),
        ("temperature", {"temperature": lambda p: math.nan}),
        ("student_softcap", {"student_softcap": lambda p: -1.0}),
        ("student_logit_scale", {"student_logit_scale": lambda p: math.nan}),
        ("token_weights", {"token_weights": lambda p: zeros(4)}),
        ("target_ids", {"target_ids": lambda p: zeros(5)}),
        ("vocab_size", {"vocab_size": lambda p: 100}),
        ("workspace_bytes", {"workspace_bytes": lambda p: 0}),
        ("backend", {"backend": lambda p: "cuda"}),
    ],
)
def test_divergence(problem, argument, changes):
    values = {
        "student_hidden": problem.student_hidden,
        "student_weight": problem.student_weight,
        "target": target(problem),
    }
    values.update({name: build(problem) for name, build in changes.items()})
    with pytest.raises(ERRORS, match=argument):
        fused_linear_divergence(**values)


def test_nothing_wrong_raises_nothing(problem):
    """Guards the tables above: the unchanged inputs are accepted, with and without biases."""
    fused_linear_vgs_loss(*problem.args(), **problem.biases())
    fused_linear_vgs_loss(*replace(problem, student_bias=None, teacher_bias=None).args())
    vgs_loss(*rows(problem).values())
    fused_linear_divergence(problem.student_hidden, problem.student_weight, target(problem))
