"""Random calls of the losses against the float64 reference: ``python -m tests.kernels.random_cases --cases 100000``.

Every case is drawn from its number alone: a loss, its options, a dtype, sizes, masks, weights and how far the models
are apart, out to rows without any spread and rows of which one entry is certain. A case is wrong if a value or a
gradient is further from the reference than rounding explains: a bound from the size of the logits, and ten times the
error of plain PyTorch in the same dtype. With ``--resume FILE`` what was done is kept, and gone on from.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from divergence_checks import on_rows
from divergence_oracle import family_oracle
from oracle import vgs_oracle
from problems import TRAINABLE, Evaluation, Problem, evaluate, largest_logit, make_problem

from vgs_kernels import PolicyTerm, VGSObjective, fused_linear_divergence, fused_linear_vgs_loss

VALUES = ("standard", "visual", "language", "vds", "student_vds", "divergence", "entropy", "target_logps", "policy")


class Case:
    """The call of one number."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.draw = random.Random(number)
        pick = self.draw.choice
        self.backend = pick(["torch"] * 9 + ["triton"])
        few = self.backend == "triton"
        self.dtype = pick([torch.float32] if few else [torch.float64, torch.float32])
        self.tokens, self.vocab = self.draw.randint(1, 3 if few else 12), self.draw.randint(2, 70 if few else 150)
        self.gap, self.spread = 10 ** self.draw.uniform(-4, 0.3), 10 ** self.draw.uniform(-1.5, 1.2)
        self.options: dict[str, Any] = {}
        self.problem = self._problem()
        self.function, self.oracle = self._vgs() if self.draw.random() < 0.5 else self._divergence()
        self.workspace = pick([2**30, 2**12, 2**9])

    def _problem(self) -> Problem:
        problem = make_problem(
            self.tokens, self.vocab, self.draw.randint(1, 7), self.draw.randint(7, 9), gap=self.gap,
            bias=self.draw.random() < 0.5, seed=self.number, dtype=torch.float64, device="cpu",
        )  # fmt: skip
        names = ("student_hidden", "student_text_hidden", "teacher_hidden", "teacher_text_hidden")
        problem = replace(problem, **{name: self.spread * getattr(problem, name) for name in names})
        if problem.student_bias is not None and self.draw.random() < 0.3:
            masked = self.draw.sample(range(self.vocab), self.draw.randint(1, max(1, self.vocab // 3)))
            keep = [i for i in masked if i != self.draw.randrange(self.vocab)][: self.vocab - 1]
            for bias in (problem.student_bias, problem.teacher_bias):
                bias[keep] = -torch.inf
            allowed = torch.tensor([i for i in range(self.vocab) if i not in keep])
            problem = replace(problem, target_ids=allowed[problem.target_ids % len(allowed)])
        return problem.to(dtype=self.dtype)

    def _shared(self) -> None:
        pick, chance = self.draw.choice, self.draw.random
        generator = torch.Generator().manual_seed(self.number)
        if chance() < 0.4:
            weights = torch.rand(self.tokens, generator=generator, dtype=self.dtype)
            self.options["token_weights"] = weights.masked_fill(weights < 0.3, 0)
        if chance() < 0.3:
            self.options["student_softcap"] = pick([5.0, 30.0])
        if chance() < 0.3:
            self.options["student_logit_scale"] = pick([0.3, 2.0])
        self.options["target_ids"] = self.problem.target_ids

    def _vgs(self) -> tuple[Any, Any]:
        pick = self.draw.choice
        self._shared()
        self.options["objective"] = VGSObjective(
            gamma=pick([0.0, 0.5, 2.0, 5.0]), lam=pick([0.0, 0.01, 1.0]), temperature=pick([0.3, 1.0, 1.7]),
            detach_prior=pick([True, False]), schedule=pick(["constant", "adaptive"]), eta=pick([0.4, 1.0]),
        )  # fmt: skip
        return fused_linear_vgs_loss, vgs_oracle

    def _divergence(self) -> tuple[Any, Any]:
        pick, chance = self.draw.choice, self.draw.random
        self._shared()
        kind = pick(["reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl"])
        options: dict[str, Any] = {"divergence": kind, "temperature": pick([0.3, 1.0, 1.7]), "beta": pick([0.1, 0.5])}
        supports = ["full", "full", "teacher_top_k", "student_top_k"] + ["plausible"] * (kind in ("forward_kl", "jsd"))
        options["support"] = pick(supports) if kind != "sampled_reverse_kl" else "full"
        if options["support"] != "full":  # a cap makes logits equal: rounding would decide which are inside
            self.options.pop("student_softcap", None)
        if "top_k" in options["support"]:
            options["top_k"] = self.draw.randint(1, min(self.vocab, 9))
        if options["support"] == "plausible":
            options["plausibility"] = pick([0.5, 0.01])
        if kind != "sampled_reverse_kl" and chance() < 0.2:
            options["clip"] = pick([0.01, 0.3])
        if options["support"] != "teacher_top_k" and chance() < 0.2:
            ones = torch.ones(self.tokens, dtype=self.dtype)
            self.options["policy"] = PolicyTerm(ones, ones / self.tokens)
        self.options |= options
        compose = pick([{"t": 1.0}, {"t": 1.0, "a": 0.6, "w": -0.6}, {"t": 0.5, "w": 0.5}])
        return on_rows(fused_linear_divergence, compose), on_rows(family_oracle, compose)

    def wrong(self) -> list[str]:
        """What of this case is further from the reference than rounding explains."""
        options = {**self.options, "requires_grad": [n for n in TRAINABLE if getattr(self.problem, n) is not None]}
        exact = evaluate(self.oracle, self.problem, dtype=torch.float64, **options)
        plain = evaluate(self.oracle, self.problem, **options)
        ours = evaluate(self.function, self.problem, backend=self.backend, workspace_bytes=self.workspace, **options)
        counted = self.options.get("token_weights", torch.ones(self.tokens)) != 0
        values = [*self._values(ours, plain, exact, counted)]
        return values if self._undecided(exact, counted) else [*values, *self._gradients(ours, plain, exact)]

    def _undecided(self, exact: Evaluation, counted: torch.Tensor) -> bool:
        """Whether rounding decides which tokens are gated: their scores lie too close to a quantile, but not on it."""
        objective, vds = self.options.get("objective"), getattr(exact.output, "vds", None)
        if vds is None or not counted.any():
            return False
        scores = vds[counted]
        distances = torch.stack([(scores - torch.quantile(scores, q)).abs() for q in objective.quantiles])
        return bool(((distances > 0) & (distances < 30 * self._rounding() * (1 + scores.abs()))).any())

    def _rounding(self) -> float:
        """What rounding the logits may do to a logarithm of a probability."""
        temperature = self.options.get("temperature", getattr(self.options.get("objective"), "temperature", 1.0))
        scale = self.options.get("student_logit_scale", 1.0) / min(temperature, 1.0)
        return torch.finfo(self.dtype).eps * (1 + largest_logit(self.problem) * max(scale, 1.0) / min(temperature, 1.0))

    def _values(self, ours: Evaluation, plain: Evaluation, exact: Evaluation, counted: torch.Tensor) -> Iterator[str]:
        for name in VALUES:
            value, other, right = (getattr(x.output, name, None) for x in (ours, plain, exact))
            if right is None or not self._comparable(name):
                continue
            value, other, right = (x.double()[counted] for x in (value, other, right))
            infinite = right.isinf() | (right.abs() > 1e30)
            if (value[infinite] < 1e20).any() or value[~infinite].isnan().any():
                yield f"{name}: {value.tolist()}, expected {right.tolist()}"
            error = (value - right)[~infinite].abs()
            bound = 30 * self._rounding() * (1 + right[~infinite].abs()) + 10 * (other - right)[~infinite].abs()
            if (error > bound).any():
                yield f"{name}: error {error.max():.2e}, allowed {bound[error.argmax()]:.2e}"

    def _comparable(self, name: str) -> bool:
        # Where the support renormalises the student, a sampled token may lie outside.
        return not (name == "target_logps" and self.options.get("support") == "teacher_top_k")

    def _gradients(self, ours: Evaluation, plain: Evaluation, exact: Evaluation) -> Iterator[str]:
        for name, gradient in ours.gradients.items():
            right, other = exact.gradients[name], plain.gradients[name]
            if gradient is None:  # it takes no part
                continue
            right = torch.zeros_like(gradient).double() if right is None else right
            if not right.isfinite().all() or (other is not None and not other.isfinite().all()):
                continue  # autograd's own NaN, of infinite values
            if not gradient.isfinite().all():
                yield f"gradient of {name}: not finite"
                continue
            size = self.problem.student_weight if "hidden" in name else self.problem.student_hidden
            floor = 100 * self._rounding() * self._pull() * (1 + float(size.abs().max()))
            error = (gradient.double() - right).norm()
            bound = floor + 10 * (0.0 if other is None else (other.double() - right).norm()) + 1e-4 * right.norm()
            if error > bound:
                yield f"gradient of {name}: error {error:.2e}, allowed {bound:.2e}, norm {right.norm():.2e}"

    def _pull(self) -> float:
        """How strongly a token may pull."""
        objective = self.options.get("objective")
        terms = 1.0 if objective is None else objective.eta * (1 + 2 * objective.gamma + objective.lam)
        return terms * self.options.get("student_logit_scale", 1.0) / min(self.options.get("temperature", 1.0), 1.0)


def run(first: int, last: int, found: dict[str, list[str]]) -> None:
    """Try the cases of these numbers; what is wrong goes to ``found``, by number."""
    for number in range(first, last):
        try:
            wrong = Case(number).wrong()
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            found[str(number)] = wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many, from the first one on")
    parser.add_argument(
        "--resume", type=Path, help="a JSON file that keeps the number of cases done and what was wrong"
    )
    args = parser.parse_args()
    done, found, start = 0, {}, time.monotonic()
    if args.resume and args.resume.exists():
        done, found = json.loads(args.resume.read_text()).values()
    while done < args.cases:
        upto = min(done + 100, args.cases)
        run(done, upto, found)
        done = upto
        print(f"{done} cases, {len(found)} wrong, {time.monotonic() - start:.0f} s", flush=True)
        if args.resume:
            args.resume.write_text(json.dumps({"done": done, "wrong": found}, indent=1))
    for number, wrong in found.items():
        print(number, *wrong, sep="\n  ")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
