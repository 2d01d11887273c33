"""How a call travels through its operator: tensors, numbers, and one specification that says what they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .active_columns import SHARES, LeftOut
from .gated_rows import GatedRows
from .gradients import LinearSink
from .heads import Head
from .parallel import VocabularyShard
from .plan import GradientView, Plan, gradient_dtype
from .policy import PolicyGradient
from .rows import Backend, backend
from .rows.layout import accumulation_dtype
from .workspace import large_empty


def specify(**parts: object) -> str:
    """The specification of a call: names, flags and choices, one a line. A list is joined by commas."""
    lines = []
    for name, value in parts.items():
        lines.append(f"{name}={','.join(value) if isinstance(value, (list, tuple)) else value}")
    return "\n".join(lines)


@functools.lru_cache
def _parts(spec: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in spec.split("\n"))


def listed(spec: str, name: str) -> list[str]:
    """A list of a specification."""
    return [value for value in _parts(spec)[name].split(",") if value]


def numbers_tensor(values: Sequence[float]) -> Tensor:
    """[K] float64 on the CPU, to be read without waiting. Traced, numbers stay numbers that may change."""
    if torch.compiler.is_compiling():
        # Of all ways to make a tensor of a number, a product alone does not compile its value in.
        return torch.stack([torch.ones((), dtype=torch.float64, device="cpu") * value for value in values])
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class Call:
    """The arguments of an operator by name.

    Args:
        student: what may receive gradient.
        fixed: all other tensors.
        numbers: [K] float64.
        spec: of ``specify``, with the names of the three (``student``, ``fixed``, ``numbers``), ``needs`` (names of
            those that want gradient), ``terms``, ``backend``, and what the loss wants to know.

    Attributes:
        dtype: of logits, statistics and gradients.
        needs: names of the student's tensors that want gradient.
        terms: names of the terms to return.
    """

    def __init__(self, student: Sequence[Tensor], fixed: Sequence[Tensor], numbers: Tensor, spec: str) -> None:
        self.options = _parts(spec)
        self.needs = listed(spec, "needs")
        self.terms = listed(spec, "terms")
        self._student = dict(zip(listed(spec, "student"), student, strict=True))
        self._tensors: Mapping[str, Tensor] = self._student | dict(zip(listed(spec, "fixed"), fixed, strict=True))
        self._names, self._values = listed(spec, "numbers"), numbers
        models = [x for name, x in self._tensors.items() if name.endswith(("hidden", "weight", "bias", "logits"))]
        self.dtype = accumulation_dtype(*models)
        if cast := self.options.get("autocast"):
            # What autocast does to a linear layer's inputs, but in here: gradients keep the parameters' dtype.
            dtype = getattr(torch, cast)
            names = [name for name in self._tensors if name.endswith(("hidden", "weight", "bias"))]
            self._tensors = self._tensors | {name: self._tensors[name].to(dtype) for name in names}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def get(self, name: str) -> Tensor | None:
        """A tensor, or None where it was not given."""
        return self._tensors.get(name)

    @functools.cached_property
    def _numbers(self) -> dict[str, float]:
        return dict(zip(self._names, self._values.tolist(), strict=True))

    def number(self, name: str) -> float | None:
        """A number, or None where it was not given."""
        return self._numbers.get(name)

    def integer(self, name: str) -> int | None:
        """A whole number, or None where it was not given."""
        return None if self.number(name) is None else int(self.number(name))

    @property
    def backend(self) -> Backend:
        return backend(self.options["backend"])

    @property
    def live(self) -> Tensor | None:
        """[N] tokens that take part in the loss or in a policy term; None: all."""
        counted, weights = self.get("counted"), self.get("policy_weights")
        return counted if counted is None or weights is None else counted | (weights != 0)

    @property
    def policy(self) -> PolicyGradient | None:
        """The policy term of the call."""
        if self.get("advantages") is None:
            return None
        epsilons = (self.number("epsilon_low"), self.number("epsilon_high"))
        return PolicyGradient(self["advantages"], self["policy_weights"], self.get("old_logps"), epsilons, self.dtype)

    def head(self, name: str, columns: int | None = None) -> Head:
        """The head of this name, or its leading columns."""
        numbers = self.number(f"{name}_scale"), self.number(f"{name}_softcap")
        return Head(self[f"{name}_weight"], self.get(f"{name}_bias"), *numbers).first(columns)

    def shard(self, heads: Sequence[Head]) -> VocabularyShard:
        """The columns of these heads that this rank uses."""
        weights, ids = [head.weight for head in heads], self.get("ids")
        ignored = None if ids is None else ids == self.integer("ignore_index")
        return VocabularyShard.of(self.options.get("vocab_group"), weights, self.integer("vocab_size"), ids, ignored)

    @property
    def needs_head(self) -> bool:
        """Whether gradients of the student's weight or bias are wanted."""
        return bool({"student_weight", "student_bias"} & set(self.needs))

    def zeros(self, name: str) -> Tensor:
        """A gradient of zeros for one of the student's tensors, empty where it is not wanted."""
        like = self._student[name]
        if name in self.needs:
            return like.new_zeros(like.shape, dtype=self.dtype)
        return like.new_empty(0, dtype=self.dtype)

    def logit_gradient(self, name: str, columns: int, written: bool) -> Tensor:
        """A gradient of logits [N, V], whose leading ``columns`` are left to the sweep if that writes them."""
        like = self._student[name]
        gradient = like.new_empty(like.shape if name in self.needs else 0)
        gradient[..., columns if written else 0 :].zero_()
        return gradient


class StudentGradients:
    """Gradients of a student's hidden states and head, of which the sweeps over a shard are to collect parts.

    Attributes:
        head: the student's, of the shard's columns.
        by_name: gradients, empty where not wanted.
        left_out: of the products, where a tolerance allows it.
        unit: what the gradients are still to be multiplied with: the loss's own, see ``policy.unit_weights``. On a CPU
            the products have done so, for that saves a pass over the head's gradient and rounds nothing more.

    Args:
        call: the arguments. columns: of the shard. n: tokens. unit: of the loss.
    """

    def __init__(self, call: Call, columns: int, n: int, unit: Tensor) -> None:
        self._call, self.head = call, call.head("student", columns)
        self._factor, self.unit = 1.0, unit
        if unit.device.type == "cpu" and type(unit) is Tensor:
            self._factor, self.unit = unit.item(), torch.ones_like(unit)
        self.by_name = {name: call.zeros(name) for name in call._student if name != "student_weight"}
        weight, needed = call._student["student_weight"], "student_weight" in call.needs
        gradient = large_empty(weight, *(weight.shape if needed else (0,)), dtype=call.dtype)
        gradient[columns if n else 0 :].zero_()  # the first block of tokens overwrites the others
        self.by_name["student_weight"] = gradient
        tolerance = call.number("gradient_tolerance")
        self.left_out = LeftOut(tolerance, n, gradient, call.backend.passes) if tolerance and call.needs else None
        self._parts = [
            self.by_name[name][:columns] if name in call.needs else None for name in ("student_weight", "student_bias")
        ]

    def view(self, name: str, alpha: float = 1.0, tokens: Tensor | None = None) -> GradientView:
        """The view of hidden states whose logits receive gradient."""
        hidden = self._call[name]
        dtype = gradient_dtype(hidden, self.head.weight, self._call.dtype)
        d_hidden = self.by_name[name] if name in self._call.needs else None
        return GradientView(hidden, d_hidden, dtype, alpha * self._factor, self._call.live, tokens)

    def sink(
        self, views: Sequence[GradientView], plan: Plan, *, add: bool = False, gated: GatedRows | None = None
    ) -> LinearSink | None:
        """Takes the gradient tiles of these views; None without any."""
        if not views:
            return None
        return LinearSink(views, self.head.weight, *self._parts, plan, add=add, left_out=self.left_out, gated=gated)

    def with_shares(self, terms: Tensor, shard: VocabularyShard) -> Tensor:
        """Terms [T, N] and, where they are asked for, ``SHARES`` of what was left out."""
        if not set(SHARES) & set(self._call.terms):
            return terms
        return torch.cat([terms, self.left_out.terms(shard).to(terms.dtype)])
