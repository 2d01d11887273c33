"""Wrong arguments of a divergence: one sentence that names the argument, what came and what was expected."""

from __future__ import annotations

import math

import pytest
import torch
from problems import DEVICE, make_problem

from vgs_kernels import Divergence, PolicyTerm, fused_linear_divergence

X = torch.zeros(5, device=DEVICE)
IDS = torch.zeros(5, dtype=torch.int64, device=DEVICE)
WRONG = {
    # what is wrong: (what the message says, options)
    "divergence": (r"divergence .*reverse_kl.*kl", {"divergence": "kl"}),
    "beta below 0": ("beta .*0, 1.*-0.1", {"divergence": "jsd", "beta": -0.1}),
    "beta above 1": ("beta .*0, 1.*1.5", {"divergence": "jsd", "beta": 1.5}),
    "beta NaN": ("beta", {"divergence": "jsd", "beta": math.nan}),
    "beta, another type": ("beta", {"divergence": "jsd", "beta": "0.5"}),
    "support": (r"support .*full.*top", {"support": "top"}),
    "top_k missing": ("top_k", {"support": "teacher_top_k"}),
    "top_k unwanted": ("top_k", {"top_k": 5}),
    "top_k 0": ("top_k .*>= 1", {"support": "student_top_k", "top_k": 0}),
    "top_k, another type": ("top_k", {"support": "student_top_k", "top_k": 5.0}),
    "top_k a bool": ("top_k", {"support": "student_top_k", "top_k": True}),
    "top_k above the vocabulary": (r"top_k .*57.*58", {"support": "teacher_top_k", "top_k": 58}),
    "student's top_k above it": (r"top_k .*57.*58", {"support": "student_top_k", "top_k": 58}),
    "plausibility missing": ("plausibility", {"support": "plausible", "divergence": "forward_kl"}),
    "plausibility unwanted": ("plausibility", {"plausibility": 0.1}),
    "plausibility 0": ("plausibility", {"support": "plausible", "divergence": "forward_kl", "plausibility": 0.0}),
    "plausibility above 1": ("plausibility", {"support": "plausible", "divergence": "forward_kl", "plausibility": 1.1}),
    "plausible reverse": ("support='plausible'", {"support": "plausible", "plausibility": 0.1}),
    "plausible jsd of beta 1": (
        "support='plausible'",
        {"support": "plausible", "plausibility": 0.1, "divergence": "jsd", "beta": 1.0},
    ),
    "clip": ("clip .*>= 0.*-0.05", {"clip": -0.05}),
    "clip NaN": ("clip", {"clip": math.nan}),
    "token_clip": ("token_clip .*>= 0", {"token_clip": -1.0}),
    "temperature": ("temperature", {"temperature": 0.0}),
    "temperature_squared": ("temperature_squared", {"temperature_squared": 2.0}),
    "sampled on a support": (
        "sampled_reverse_kl",
        {"divergence": "sampled_reverse_kl", "support": "student_top_k", "top_k": 2},
    ),
    "sampled and clip": ("clip", {"divergence": "sampled_reverse_kl", "clip": 0.1}),
    "sampled without ids": ("target_ids", {"divergence": "sampled_reverse_kl"}),
    "reduction": (r"reduction .*mean.*sum.*none.*max", {"reduction": "max"}),
    "policy on the teacher's top_k": (
        r"policy .*teacher_top_k",
        {"policy": PolicyTerm(X, X), "target_ids": IDS, "support": "teacher_top_k", "top_k": 5},
    ),
    "policy without a sum": (
        r"policy .*reduction='none'",
        {"policy": PolicyTerm(X, X), "target_ids": IDS, "reduction": "none"},
    ),
    "policy without ids": ("target_ids", {"policy": PolicyTerm(X, X)}),
    "policy, another type": ("policy", {"policy": {"advantages": X}, "target_ids": IDS}),
    "policy advantages": (r"policy\.advantages", {"policy": PolicyTerm(X[:4], X), "target_ids": IDS}),
    "policy weights": (r"policy\.weights", {"policy": PolicyTerm(X, IDS), "target_ids": IDS}),
    "policy old_logps": (r"policy\.old_logps", {"policy": PolicyTerm(X, X, X[None]), "target_ids": IDS}),
    "policy epsilon_low": (r"policy\.epsilon_low", {"policy": PolicyTerm(X, X, X, -0.1), "target_ids": IDS}),
    "policy epsilon_high": (r"policy\.epsilon_high", {"policy": PolicyTerm(X, X, X, 0.1, math.nan), "target_ids": IDS}),
    "token_weights": ("token_weights", {"token_weights": X[:4]}),
    "token_weights of none": ("token_weights", {"token_weights": IDS, "reduction": "none"}),
    "target_ids": ("target_ids", {"target_ids": X}),
    "vocab_size": ("vocab_size", {"vocab_size": 58}),
    "backend": ("backend", {"backend": "cuda"}),
    "workspace_bytes": ("workspace_bytes", {"workspace_bytes": 0}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_option(name):
    message, options = WRONG[name]
    problem = make_problem(5, 57, 6, 8)
    rows = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    with pytest.raises((ValueError, TypeError), match=message):
        fused_linear_divergence(problem.student_hidden, problem.student_weight, rows, **options)


@pytest.mark.parametrize(
    ("coefficient", "message"),
    [
        (torch.zeros(4, device=DEVICE), r"target\[1\]\.coefficient"),
        (torch.zeros(5, 1, device=DEVICE), r"target\[1\]\.coefficient"),
        (torch.zeros(5, device="meta"), r"target\[1\]\.coefficient"),
        (torch.zeros(5, dtype=torch.int64, device=DEVICE), r"target\[1\]\.coefficient"),
        (math.nan, r"target\[1\]\.coefficient"),
        ("1", r"target\[1\]\.coefficient"),
        (None, r"target\[1\]\.coefficient"),
    ],
)
def test_wrong_coefficient(coefficient, message):
    problem = make_problem(5, 57, 6, 8)
    row = (problem.teacher_hidden, problem.teacher_weight)
    with pytest.raises((ValueError, TypeError), match=message):
        fused_linear_divergence(problem.student_hidden, problem.student_weight, [(1.0, *row), (coefficient, *row)])


def test_settings_are_immutable():
    with pytest.raises(AttributeError):
        Divergence().beta = 0.1
