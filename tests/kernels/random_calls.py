"""Random calls of the losses, and the same from the definition; random_cases.py compares the two."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from divergence_checks import on_rows
from divergence_oracle import family_oracle
from oracle import head_logits, vgs_oracle
from problems import TRAINABLE, Evaluation, Problem, evaluate
from torch import Tensor

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

STATES = ("student_hidden", "student_text_hidden", "teacher_hidden", "teacher_text_hidden")
HEADS = ("student_weight", "student_bias", "teacher_weight", "teacher_bias")
DTYPES = {"student": ("student_hidden", "student_weight"), "teacher": ("teacher_hidden", "teacher_weight")}
NOBODY = -100


def steered_oracle(*args: Tensor, policy: PolicyTerm | None = None, **options: Any) -> Any:
    """The VGS loss and a policy term, each from its definition."""
    out = vgs_oracle(*args, **options)
    if policy is not None:
        shared = {name: options[name] for name in options if name in ("student_bias", "target_ids")}
        shared |= {name: options[name] for name in ("student_softcap", "student_logit_scale") if name in options}
        alone = on_rows(family_oracle, {"t": 1.0})(
            *args,
            policy=policy,
            token_weights=0 * policy.weights,
            temperature=options["objective"].temperature,
            **shared,
        )
        out.loss, out.policy = out.loss + alone.loss, alone.policy
    return out


def projected(function: Any, dead: Tensor, spoilt: float, padding: int, capped: str) -> Any:
    """A loss of logits as one of hidden states; ``dead`` tokens and further columns hold what must not be looked at.

    The student's scale and soft-cap are those of the rows in ``capped``.
    """

    def run(s, a, student, t, w, teacher, *, student_bias=None, teacher_bias=None, **options):
        names = ("softcap", "logit_scale")
        given = {name: options.pop(f"student_{name}") for name in names if f"student_{name}" in options}
        options.pop("workspace_bytes")
        heads = {"s": (s, student, student_bias), "a": (a, student, student_bias)}
        heads |= {"t": (t, teacher, teacher_bias), "w": (w, teacher, teacher_bias)}
        rows = []
        for name, head in heads.items():
            logits = head_logits(*head, **(given if name in capped else {})).masked_fill(dead[:, None], spoilt)
            rows.append(torch.nn.functional.pad(logits, (0, padding), value=torch.nan))
        return function(*rows, **options)

    return run


class RandomCall:
    """The call of one number.

    Attributes:
        problem, options: of our call.
        clean, exact_options: the same for the reference: without NaN and padding, all weights spelt out.
    """

    def __init__(self, number: int) -> None:
        self.number, self.draw = number, random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        pick, chance = self.draw.choice, self.draw.random
        self.backend = "triton" if chance() < 0.015 else ("auto", "torch")[number % 4 == 0]  # loops in float32
        few = self.backend == "triton"
        self.dense = chance() < 0.2
        self.kind = pick(["vgs", "divergence"])
        names = (
            ["float32"] if few else ["float64", "float32", "float32"] if self.dense else ["float64", "float32", "mixed"]
        )
        self.dtypes = pick(names)
        self.tokens = self.draw.randint(1, 3 if few else 12)
        self.vocab = self.draw.randint(2, 70 if few else 150)
        self.double = self.dtypes == "float64"
        self.dtype = torch.float64 if self.double else torch.float32
        self.options: dict[str, Any] = {"workspace_bytes": pick([2**30, 2**12, 2**9])}
        self.clean = self._problem()
        self._shared()
        self.compose = self._vgs() if self.kind == "vgs" else self._divergence()
        self.upstream = self._weights()
        self._policy()
        self.problem = self._spoiled()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _problem(self) -> Problem:
        """Four rows of logits of any spread, the teacher's at any distance from the student's."""
        n, vocab, chance = self.tokens, self.vocab, self.draw.random
        d = self.draw.randint(1, 7)
        more = self.draw.randint(0, 3)
        gap, spread = 10 ** self.draw.uniform(-5, 0.3), 10 ** self.draw.uniform(-1.5, 1.2)
        blind = 10 ** torch.empty(n, 1, dtype=torch.float64).uniform_(-3, 0, generator=self.generator)
        hidden, weight = spread * self._normal(n, d), self._normal(vocab, d) / d**0.5
        values = {"student_hidden": hidden, "student_text_hidden": hidden + spread * blind * self._normal(n, d)}
        for name in ("hidden", "text_hidden"):
            of_student = torch.nn.functional.pad(values[f"student_{name}"], (0, more))
            values[f"teacher_{name}"] = of_student + gap * spread * self._normal(n, d + more)
        teacher = torch.nn.functional.pad(weight, (0, more)) + gap * self._normal(vocab, d + more)
        values |= {"student_weight": weight, "teacher_weight": teacher}
        allowed = list(range(vocab))
        if chance() < 0.5:
            values["student_bias"] = self._normal(vocab)
            values["teacher_bias"] = values["student_bias"] + gap * self._normal(vocab)
            if chance() < 0.3:
                masked = self.draw.sample(allowed, self.draw.randint(1, max(1, vocab // 3)))[: vocab - 1]
                allowed = [i for i in allowed if i not in masked]
                values["student_bias"][masked] = values["teacher_bias"][masked] = -torch.inf
        ids = torch.tensor([self.draw.choice(allowed) for _ in range(n)])
        values = {name: x.to(self.dtype) for name, x in values.items()}
        if self.dtypes == "mixed":
            for names in self.draw.sample(list(DTYPES.values()), self.draw.randint(1, 2)):
                values |= {name: values[name].bfloat16() for name in self.draw.sample(names, self.draw.randint(1, 2))}
        return Problem(target_ids=ids, **values)

    def _shared(self) -> None:
        pick, chance = self.draw.choice, self.draw.random
        if chance() < 0.3:
            self.options["student_softcap"] = pick([5.0, 30.0])
        if chance() < 0.3:
            self.options["student_logit_scale"] = pick([0.3, 2.0])
        self.options["target_ids"] = self.clean.target_ids

    def _vgs(self) -> dict[str, float] | None:
        pick, chance, options = self.draw.choice, self.draw.random, self.options
        objective = VGSObjective(
            gamma=pick([0.0, 0.5, 2.0, 5.0]), lam=pick([0.0, 0.01, 1.0]), temperature=pick([0.3, 1.0, 1.7]),
            detach_prior=pick([True, False]), schedule=pick(["constant", "constant", "adaptive"]), eta=pick([0.4, 1.0]),
            vds_scope=pick(["call", "call", "trajectory"]),
        )  # fmt: skip
        options["objective"] = objective
        if objective.vds_scope == "trajectory":
            options["trajectory_ids"] = torch.tensor([self.draw.randint(-1, 2) for _ in range(self.tokens)])
        if chance() < 0.15:
            options["vds"] = torch.rand(self.tokens, generator=self.generator, dtype=self.dtype)
        if chance() < 0.15:
            low = self.draw.uniform(0, 1)
            options["vds_threshold"] = (low, low + 0.1) if objective.schedule == "adaptive" else low
        return None

    def _divergence(self) -> dict[str, float]:
        pick, chance = self.draw.choice, self.draw.random
        kind = pick(["reverse_kl", "forward_kl", "jsd", "jsd", "sampled_reverse_kl"])
        options: dict[str, Any] = {"divergence": kind, "temperature": pick([0.3, 1.0, 1.7])}
        options["beta"], options["temperature_squared"] = pick([0.0, 0.1, 0.5, 0.9]), pick([True, False])
        if kind == "sampled_reverse_kl":
            options["support"] = "full"
        else:
            meets = kind == "forward_kl" or (kind == "jsd" and options["beta"] < 1)
            options["support"] = pick(["full", "full", "teacher_top_k", "student_top_k", *["plausible"] * meets])
            if chance() < 0.2:
                options["clip"] = pick([0.01, 0.3])
        if "top_k" in options["support"]:
            options["top_k"] = self.draw.randint(1, min(self.vocab, 9))
        if options["support"] == "plausible":
            options["plausibility"] = pick([0.5, 0.01])
        if chance() < 0.15:
            options["token_clip"] = pick([0.05, 1.0])
        if options["support"] != "full":  # a cap makes logits equal: rounding would decide which are inside
            self.options.pop("student_softcap", None)
        self.options |= options
        return pick([{"t": 1.0}, {"t": 1.0, "a": 0.6, "w": -0.6}, {"t": 0.5, "w": 0.5}])

    def _weights(self) -> Tensor | None:
        """Token weights, ignored tokens and reductions; returns what an unreduced loss is multiplied with."""
        chance, n = self.draw.random, self.tokens
        weights, self.ignored, upstream = None, torch.zeros(n, dtype=torch.bool), None
        if chance() < 0.4:
            weights = torch.rand(n, generator=self.generator, dtype=self.dtype)
            self.options["token_weights"] = weights = weights.masked_fill(weights < 0.3, 0)
        if chance() < 0.3:
            self.ignored = torch.rand(n, generator=self.generator) < self.draw.choice([0.3, 0.3, 1.0])
        reduction = self.options["reduction"] = self.draw.choice([None, None, "mean", "sum", "none"])
        effective = torch.ones(n, dtype=self.dtype) if weights is None else weights
        effective = effective.masked_fill(self.ignored, 0)
        self.counted = effective != 0
        if (reduction is None and weights is None) or reduction == "mean":
            effective = effective / (effective.sum() if self.counted.any() else 1)
        if reduction == "none":
            upstream = self._normal(n).to(self.dtype)
            effective = effective * upstream
        self.effective = effective
        return upstream

    def _policy(self) -> None:
        self.live = self.counted
        if self.draw.random() < 0.2 and self.upstream is None and self.options.get("support") != "teacher_top_k":
            advantages, weights = self._normal(2, self.tokens).to(self.dtype) / self.tokens
            old = None if self.draw.random() < 0.5 else -2 * self._normal(self.tokens).to(self.dtype).abs()
            self.options["policy"] = PolicyTerm(advantages, weights, old)
            self.live = ~self.ignored

    def _spoiled(self) -> Problem:
        """What our call gets: heads with padding, and rows of tokens that do not take part that hold anything."""
        pick, problem = self.draw.choice, self.clean
        ids = problem.target_ids.masked_fill(self.ignored, NOBODY)
        self.options["target_ids"] = ids
        rows = {}
        for name in STATES:
            rows[name] = getattr(problem, name).clone()
            rows[name][~self.live] = 0.0 if self.dense else pick([0.0, torch.nan, torch.inf])
        self.padding = pick([0, 0, 3])
        if self.padding and not self.dense:
            for name in HEADS:
                x, more = getattr(problem, name), self.padding + (name in ("teacher_weight", "teacher_bias"))
                if x is not None:
                    rows[name] = torch.cat([x, x.new_full((more, *x.shape[1:]), torch.nan)])
        if self.padding:
            self.options["vocab_size"] = self.vocab
        return replace(problem, **rows)

    # ------------------------------------------------------------------------------------------- ours and the reference

    def ours(self) -> Evaluation:
        options = {**self.options, "backend": self.backend}
        if self.kind == "vgs":
            function = self._projected(vgs_loss, "sa") if self.dense else fused_linear_vgs_loss
            objective = options["objective"]
            foldable = objective.lam == 0 and objective.schedule == "constant" and objective.detach_prior
            self.folded = foldable and not self.dense and self.dtypes != "mixed" and self.draw.random() < 0.5
            options |= {"return_terms": False} if self.folded else {}
        elif self.dense:
            self.folded = False
            order = dict(zip("satw", range(4), strict=True))

            def function(*rows: Tensor, **given: Any) -> Any:
                target = [(c, rows[order[name]].detach()) for name, c in self.compose.items()]
                return divergence_loss(rows[0], target, **given)

            function = self._projected(function, "s")
        else:
            self.folded = False
            options["fold"] = self.dtypes != "mixed" and self.draw.random() < 0.7
            function = on_rows(fused_linear_divergence, self.compose)
        return evaluate(self._in_shape(function), self.problem, requires_grad=self._trained(), **options)

    def _projected(self, function: Any, capped: str) -> Any:
        return projected(function, ~self.live, self.draw.choice([0.0, torch.nan, torch.inf]), self.padding, capped)

    def _in_shape(self, function: Any) -> Any:
        """Sometimes with two leading dimensions; an unreduced loss is summed with its upstream gradient."""
        deep = not self.dense and "policy" not in self.options and self.draw.random() < 0.15
        tokens = ("token_weights", "target_ids", "vds", "trajectory_ids")

        def run(*args: Tensor, **options: Any) -> Any:
            if deep:
                args = [x.unsqueeze(0) if i not in (2, 5) else x for i, x in enumerate(args)]
                options = {name: x.unsqueeze(0) if name in tokens else x for name, x in options.items()}
            out = function(*args, **options)
            if self.upstream is not None:
                out.loss = (self.upstream * out.loss.reshape(-1)).sum()
            return out

        return run

    def _trained(self) -> list[str]:
        return [name for name in TRAINABLE if getattr(self.clean, name) is not None]

    def exact(self, problem: Problem, dtype: torch.dtype, **given: Tensor) -> Evaluation:
        left_out = ("workspace_bytes", "vocab_size", "reduction")
        options = {name: x for name, x in self.options.items() if name not in left_out}
        options |= {"token_weights": self.effective, "target_ids": self.clean.target_ids, **given}
        if "policy" in options:
            policy = options["policy"]
            options["policy"] = policy._replace(weights=policy.weights.masked_fill(self.ignored, 0))
        oracle = steered_oracle if self.kind == "vgs" else on_rows(family_oracle, self.compose)
        return evaluate(oracle, problem, dtype=dtype, requires_grad=self._trained(), **options)
