"""Two hundred calls of the public functions, drawn from seeds: every loss, option and dtype, on both row backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from problems import Problem, make_problem
from torch import Tensor

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

CUT = {"workspace_bytes": 2**12}
CAPS = {"student_softcap": 15.0, "teacher_softcap": 20.0}
SCALES = {"student_logit_scale": 0.8, "teacher_logit_scale": 1.3}
STRONG = {"lam": 0.4, "gamma": 0.7}
ADAPTIVE = {**STRONG, "schedule": "adaptive"}
POLICY, WEIGHTS, IDS, TRAJECTORIES, SCORES = (object() for _ in range(5))  # what depends on the problem

#: (objective, options of the call)
VGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": ({}, {"target_ids": IDS}),
    "cut": (STRONG, CUT),
    "gamma 0": ({"gamma": 0.0, "lam": 0.4}, {}),
    "lam 0": ({"lam": 0.0}, {}),
    "live prior": ({**STRONG, "detach_prior": False}, {}),
    "live prior, lam 0": ({"lam": 0.0, "detach_prior": False}, CUT),
    "adaptive": (ADAPTIVE, {}),
    "adaptive, live, cut": ({**ADAPTIVE, "detach_prior": False, "adaptive_quantile": 0.2}, CUT),
    "trajectory": ({**STRONG, "vds_scope": "trajectory"}, {"trajectory_ids": TRAJECTORIES}),
    "threshold": (STRONG, {"vds_threshold": 0.2}),
    "thresholds": (ADAPTIVE, {"vds_threshold": (0.05, 0.4)}),
    "scores": (STRONG, {"vds": SCORES, "token_weights": WEIGHTS}),
    "scores, threshold, live": ({**STRONG, "detach_prior": False}, {"vds": SCORES, "vds_threshold": 0.4}),
    "caps": (STRONG, CAPS),
    "scales, temperature": ({**STRONG, "temperature": 0.7, "eta": 0.41}, SCALES),
    "policy": ({**STRONG, "vds_quantile": 0.5}, {"policy": POLICY, "target_ids": IDS}),
    "fewer columns": (STRONG, {"vocab_size": 100}),
    "folded": ({"lam": 0.0, "eta": 0.4}, {"return_terms": False}),
    "folded, policy": ({"lam": 0.0}, {"return_terms": False, "policy": POLICY, "target_ids": IDS}),
}
TEACHER, STEERED = {"t": 1.0}, {"t": 1.0, "a": 0.6, "w": -0.6}
#: (target, options)
DIVERGENCE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reverse": (TEACHER, {"target_ids": IDS}),
    "reverse, steered, cut": (STEERED, CUT),
    "reverse, apart": (STEERED, {"fold": False, "token_weights": WEIGHTS}),
    "forward": (TEACHER, {"divergence": "forward_kl"}),
    "jsd": (STEERED, {"divergence": "jsd"}),
    "jsd 0.2, cut": (TEACHER, {"divergence": "jsd", "beta": 0.2, "temperature": 1.3, **CUT}),
    "jsd 1": (TEACHER, {"divergence": "jsd", "beta": 1.0, "temperature_squared": True, "temperature": 0.8}),
    "clip": (TEACHER, {"divergence": "jsd", "clip": 0.01}),
    "clipped reverse": (TEACHER, {"clip": 0.02, "token_clip": 0.5}),
    "teacher top-k": (TEACHER, {"divergence": "jsd", "support": "teacher_top_k", "top_k": 8}),
    "student top-k": (STEERED, {"support": "student_top_k", "top_k": 8, "student_softcap": 15.0}),
    "student top-k, forward": (TEACHER, {"divergence": "forward_kl", "support": "student_top_k", "top_k": 8, **CUT}),
    "plausible": (TEACHER, {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.02}),
    "plausible, steered": (STEERED, {"divergence": "jsd", "support": "plausible", "plausibility": 0.02}),
    "sampled": (TEACHER, {"divergence": "sampled_reverse_kl", "target_ids": IDS, "token_clip": 1.0}),
    "policy": (STEERED, {"divergence": "jsd", "policy": POLICY, "target_ids": IDS}),
    "none": (TEACHER, {"reduction": "none", "token_weights": WEIGHTS}),
    "none, jsd": (STEERED, {"reduction": "none", "divergence": "jsd", "student_logit_scale": 0.9}),
}
DENSE_VGS = {name: VGS[name] for name in ("paper", "live prior", "adaptive", "scores", "policy", "fewer columns")}
DENSE_DIVERGENCE = {
    name: DIVERGENCE[name]
    for name in (*("reverse", "forward", "jsd", "clip", "teacher top-k", "plausible, steered", "sampled"),)
}
LOSSES = {"vgs": VGS, "divergence": DIVERGENCE, "vgs logits": DENSE_VGS, "divergence logits": DENSE_DIVERGENCE}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """One call, with values and gradients."""

    loss: str
    name: str
    dtype: torch.dtype
    backend: str
    seed: int

    @property
    def key(self) -> str:
        return " | ".join((self.loss, self.name, str(self.dtype).removeprefix("torch."), self.backend))

    def problem(self) -> Problem:
        few = self.backend == "triton"
        return make_problem(
            3 if few else 9, 131, 6, 8, bias=self.seed % 2 == 0, gap=(0.5, 0.1)[self.seed % 3 == 0], seed=self.seed,
            dtype=self.dtype,
        )  # fmt: skip

    def run(self) -> dict[str, Tensor]:
        """Everything that the call returns, and the gradients."""
        problem = self.problem()
        leaves = problem.leaves()
        setting, options = LOSSES[self.loss][self.name]
        options = {key: _filled(value, problem) for key, value in options.items()} | {"backend": self.backend}
        call, inputs = _CALLS[self.loss](leaves, setting, options)
        out = call()
        values = {name: x for name, x in vars(out).items() if isinstance(x, Tensor)}
        out.loss.sum().backward()
        gradients = {f"d_{name}": x.grad for name, x in inputs.items() if x is not None and x.grad is not None}
        return {name: x.detach() for name, x in (values | gradients).items()}


def cases() -> list[Case]:
    """All of them, in a fixed order."""
    found: list[Case] = []
    for loss, calls in LOSSES.items():
        for name in calls:
            found += [Case(loss, name, dtype, "torch", len(found) + i) for i, dtype in enumerate(DTYPES)]
            found.append(
                Case(loss, name, torch.float32 if len(found) % 8 < 4 else torch.bfloat16, "triton", len(found))
            )
    return found


def _filled(value: Any, problem: Problem) -> Any:
    n = problem.tokens
    generator = torch.Generator().manual_seed(n)
    random = torch.rand(n, generator=generator).to(problem.student_hidden.device)
    ids = problem.target_ids % 100
    return {
        id(POLICY): lambda: PolicyTerm(2 * random - 1, random / n, -3 * random),
        id(WEIGHTS): lambda: 0.1 + random,
        id(IDS): lambda: ids,
        id(TRAJECTORIES): lambda: torch.arange(n, device=ids.device) % 3,
        id(SCORES): lambda: random,
    }.get(id(value), lambda: value)()


Prepared = tuple[Callable[[], Any], dict[str, Tensor | None]]


def _students(leaves: Problem) -> dict[str, Tensor | None]:
    return {name: getattr(leaves, name) for name in ("student_hidden", "student_weight", "student_bias")}


def _vgs(leaves: Problem, setting: dict[str, Any], options: dict[str, Any]) -> Prepared:
    inputs = {**_students(leaves), "student_text_hidden": leaves.student_text_hidden}
    objective = VGSObjective(**setting)
    return lambda: fused_linear_vgs_loss(*leaves.args(), **leaves.biases(), objective=objective, **options), inputs


def _rows(leaves: Problem) -> dict[str, tuple[Tensor, ...]]:
    teacher = (leaves.teacher_weight, leaves.teacher_bias)
    return {
        "t": (leaves.teacher_hidden, *teacher),
        "a": (leaves.student_text_hidden, leaves.student_weight, leaves.student_bias),
        "w": (leaves.teacher_text_hidden, *teacher),
    }


def _divergence(leaves: Problem, setting: dict[str, Any], options: dict[str, Any]) -> Prepared:
    rows = _rows(leaves)
    target = [(coefficient, *rows[name]) for name, coefficient in setting.items()]
    args = (leaves.student_hidden, leaves.student_weight, target)
    return lambda: fused_linear_divergence(*args, student_bias=leaves.student_bias, **options), _students(leaves)


def _logits(leaves: Problem) -> dict[str, Tensor]:
    rows = {**_rows(leaves), "s": (leaves.student_hidden, leaves.student_weight, leaves.student_bias)}
    return {name: torch.nn.functional.linear(*row).detach().requires_grad_(name in "sa") for name, row in rows.items()}


def _vgs_logits(leaves: Problem, setting: dict[str, Any], options: dict[str, Any]) -> Prepared:
    x = _logits(leaves)
    objective = VGSObjective(**setting)
    return lambda: vgs_loss(x["s"], x["a"], x["t"], x["w"], objective=objective, **options), {
        "logits": x["s"], "text_logits": x["a"],
    }  # fmt: skip


def _divergence_logits(leaves: Problem, setting: dict[str, Any], options: dict[str, Any]) -> Prepared:
    x = _logits(leaves)
    target = [(coefficient, x[name]) for name, coefficient in setting.items()]
    return lambda: divergence_loss(x["s"], target, **options), {"logits": x["s"]}


_CALLS = {"vgs": _vgs, "divergence": _divergence, "vgs logits": _vgs_logits, "divergence logits": _divergence_logits}
