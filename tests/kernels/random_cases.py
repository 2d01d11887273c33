"""Random calls of the losses against the float64 reference: ``python -m tests.kernels.random_cases --cases 100000``.

Every case is drawn from its number alone: a function, its options, dtypes, sizes, masks, padding, tokens that do not
take part (whose states may be NaN), and how far the models are apart, out to rows without any spread and rows of which
one entry is certain. A case is wrong if the loss, a term or a gradient is further from the reference than rounding
explains: a bound from the size of the logits and, where that is exceeded, ten times the error of plain PyTorch in the
same dtype, or how far the reference itself moves when the inputs move by some roundings (there a token may be gated or
not, an entry be inside of a support or not). The gate has to be that of the call's own scores. With ``--resume FILE``
what was done is kept, and gone on from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.kernels.random_calls import HEADS, STATES, RandomCall

from oracle import gate_and_gamma  # isort: skip  (found by way of random_calls)
from problems import Evaluation, Problem, largest_logit  # isort: skip  (found by way of random_calls)

DRAWN_BY = (Path(__file__).with_name("random_calls.py"), Path(__file__))
TERMS = ("standard", "visual", "language", "vds", "student_vds", "divergence", "entropy", "target_logps", "policy")


class Case(RandomCall):
    """The call of one number, compared with the reference."""

    def _readings(self, x: Evaluation) -> dict[str, Tensor]:
        """Everything to be compared, in float64: terms of tokens that take part, the loss, gradients."""
        found = {}
        for name in TERMS:
            value = getattr(x.output, name, None)
            if value is not None and not (name == "target_logps" and self.options.get("support") == "teacher_top_k"):
                taking_part = self.live if name in ("target_logps", "policy") else self.counted
                found[name] = value.double().reshape(-1)[taking_part]
        found["loss"] = x.loss.double().reshape(1)
        for name, gradient in x.gradients.items():
            like = getattr(self.clean, name)
            gradient = torch.zeros_like(like) if gradient is None else gradient
            found[f"gradient of {name}"] = gradient[: len(like)].double()
        return found

    def wrong(self) -> list[str]:
        """What of this case is further from the reference than rounding explains."""
        evaluation = self.ours()
        ours, exact = self._readings(evaluation), self._readings(self.exact(self.clean, torch.float64))
        complaints = self._void(evaluation) + self._misgated(evaluation)
        if self.folded:  # another constant, and the terms that are formed
            exact = {name: x for name, x in exact.items() if name in ours and name != "loss"}
            exact.pop("gradient of student_text_hidden")
        rounding = self._rounding()
        doubtful = {name: x for name, x in exact.items() if not self._close(name, ours.get(name), x, rounding, [])}
        if doubtful:
            others = [self._readings(self.exact(self.clean, self.dtype))]
            others += [self._readings(self.exact(self._moved(30), torch.float64)) for _ in range(6)]
            regated = self._regated(evaluation)
            for name, x in doubtful.items():
                references = [x, *([regated[name]] if name in regated else [])]
                moved = [other[name] for other in others]
                if not any(self._close(name, ours.get(name), right, rounding, moved) for right in references):
                    size = "missing" if name not in ours else f"error {(ours[name] - x).norm():.2e}"
                    complaints.append(f"{name}: {size}, norm {x.norm():.2e}")
        return complaints

    def _regated(self, ours: Evaluation) -> dict[str, Tensor]:
        """What the reference says with the call's own scores: where two agree to rounding, either may be gated."""
        if self.kind != "vgs" or self.options.get("vds") is not None:
            return {}
        own = ours.output.vds.detach().double().reshape(-1)
        found = self._readings(self.exact(self.clean, torch.float64, vds=own))
        return {name: x for name, x in found.items() if name != "vds"}  # which are compared themselves

    def _void(self, ours: Evaluation) -> list[str]:
        """What of tokens that do not take part, and of padding, is not 0."""
        found = []
        gate, ids = getattr(ours.output, "gate", None), ours.output.target_logps
        if gate is not None and gate.reshape(-1)[~self.counted].any():
            found.append("gate of tokens that do not take part")
        if self.ignored.any() and ids.reshape(-1)[self.ignored].any():
            found.append("target_logps of ignored tokens")
        for name, gradient in ours.gradients.items():
            like = getattr(self.clean, name)
            rest = gradient[len(like) :] if name in HEADS else None if gradient is None else gradient[~self.live]
            if rest is not None and (rest != 0).any():
                found.append(f"gradient of {name} where there is none")
        return found

    def _misgated(self, ours: Evaluation) -> list[str]:
        """Whether the gate is another than that of the call's own scores, which are compared themselves.

        The reference's own gate says less: of scores that agree to rounding, either may be the larger one.
        """
        gate = getattr(ours.output, "gate", None)
        if gate is None:
            return []
        given = (self.options["objective"], self.options.get("vds_threshold"), self.options.get("trajectory_ids"))
        right, _ = gate_and_gamma(ours.output.vds.reshape(-1).double(), *given, counted=self.counted)
        wrong = (gate.reshape(-1) != right).nonzero().flatten().tolist()
        return [f"gate of tokens {wrong}"] if wrong else []

    def _rounding(self) -> float:
        """What rounding the logits may do to a logarithm of a probability."""
        temperature = self.options.get("temperature", getattr(self.options.get("objective"), "temperature", 1.0))
        scale = max(self.options.get("student_logit_scale", 1.0) / min(temperature, 1.0), 1.0)
        biases = [x[x.isfinite()].abs().max() for x in self.clean.biases().values()]
        largest = largest_logit(self.clean) + float(max(biases, default=0.0))
        return torch.finfo(self.dtype).eps * (1 + largest * scale)

    def _moved(self, roundings: float) -> Problem:
        """The clean problem in float64, moved by some roundings."""
        problem, by = self.clean.to(dtype=torch.float64), roundings * torch.finfo(self.dtype).eps
        names = [name for name in (*STATES, *HEADS) if getattr(problem, name) is not None]
        moved = {name: getattr(problem, name) for name in names}
        return replace(problem, **{n: x * (1 + by * self._normal(*x.shape)) for n, x in moved.items()})

    def _close(self, name: str, value: Tensor | None, right: Tensor, rounding: float, others: list[Tensor]) -> bool:
        if value is None:
            return False
        pull = self._pull()
        if "gradient" in name:
            if not right.isfinite().all():
                return True  # autograd's own NaN, of infinite values
            like = self.clean.student_weight if "hidden" in name else self.clean.student_hidden
            parameter = getattr(self.clean, name.removeprefix("gradient of "))
            bound = 10 * rounding * pull * (1 + float(like.double().abs().max()))
            bound += (100 * torch.finfo(self.dtype).eps + 4e-3 * (parameter.dtype == torch.bfloat16)) * float(
                right.norm()
            )
            errors = [(x - right).norm() for x in (value, *others)]
        else:
            infinite = right.isinf() | (right.abs() > 1e30)
            if (value[infinite] * right[infinite].sign() < 1e20).any() or value[~infinite].isnan().any():
                return False
            bound = 30 * rounding * (1 + right.abs()) * (pull * self.tokens if name == "loss" else 1.0)
            errors = [(x - right).masked_fill(infinite, 0).abs() for x in (value, *others)]
        if others:
            bound = bound + 10 * errors[1] + 3 * torch.stack(errors[2:]).amax(0)
        return bool((errors[0] <= bound).all())

    def _pull(self) -> float:
        """How strongly a token may pull."""
        options = self.options
        objective, policy = options.get("objective"), options.get("policy")
        terms = 1.0 if objective is None else objective.eta * (1 + 2 * objective.gamma + objective.lam)
        terms *= float(self.effective.abs().max())
        if policy is not None:
            ratios = 1.0 if policy.old_logps is None else float((-policy.old_logps).exp().max())
            terms += ratios * float((policy.weights * policy.advantages).abs().max())
        temperature = options.get("temperature", getattr(objective, "temperature", 1.0))
        scale = temperature**2 if options.get("temperature_squared") else 1.0
        return terms * max(scale, 1.0) * max(options.get("student_logit_scale", 1.0), 1.0) / min(temperature, 1.0)


def run(first: int, last: int, found: dict[str, list[str]]) -> None:
    """Try the cases of these numbers; what is wrong goes to ``found``, by number."""
    for number in range(first, last):
        try:
            wrong = Case(number).wrong()
        except Exception as error:
            wrong = [f"{type(error).__name__}: {error}"]
        if wrong:
            found[str(number)] = wrong


class Record:
    """How far the cases are, in a file that survives an interruption; cases drawn otherwise are refused."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.done, self.wrong = path, 0, {}
        self._drawn = hashlib.sha256(b"".join(path.read_bytes() for path in DRAWN_BY)).hexdigest()[:12]
        if path is not None and path.exists():
            kept = json.loads(path.read_text())
            if kept["drawn by"] != self._drawn:
                sys.exit(f"{path} counts cases drawn by {kept['drawn by']}, expected {self._drawn}, these programs.")
            self.done, self.wrong = kept["done"], kept["wrong"]

    def save(self) -> None:
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps({"drawn by": self._drawn, "done": self.done, "wrong": self.wrong}, indent=1))
            new.replace(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many, from the first one on")
    parser.add_argument("--resume", type=Path, help="JSON file that keeps the number of cases done and what was wrong")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, in Triton's interpreter
    record = Record(args.resume)
    start, before = time.monotonic(), record.done
    while record.done < args.cases:
        upto = min(record.done + 100, args.cases)
        run(record.done, upto, record.wrong)
        record.done = upto
        record.save()
        rate = (record.done - before) / (time.monotonic() - start)
        line = f"{record.done} of {args.cases} cases, {len(record.wrong)} wrong, {rate:.1f} a second"
        print(line, end="\r" if sys.stdout.isatty() else "\n", flush=True)
    for number, wrong in record.wrong.items():
        print(number, *wrong, sep="\n  ")
    sys.exit(bool(record.wrong))


if __name__ == "__main__":
    main()
