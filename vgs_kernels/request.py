"""One call on its way to the operator: arguments checked, flattened to [N, .] and named, and results shaped again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks, operators
from .active_columns import SHARES
from .arguments import numbers_tensor, specify
from .divergence import Divergence
from .heads import Head, TargetRow
from .objective import VGSObjective
from .parallel import group_name
from .tokens import Tokens


class Request:
    """What a public function gathers for its operator, by name.

    Args:
        tokens: of the call.
        vocab_size, backend, vocab_group: as the public functions take them.

    Attributes:
        student: tensors that may receive gradient. None is left out, here and below.
        fixed: all other tensors.
        numbers: everything that may change without another compilation.
        options: further lines of the specification.
    """

    def __init__(
        self,
        tokens: Tokens,
        vocab_size: int | None,
        backend: str,
        vocab_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        checks.instance("vocab_size", vocab_size, int, optional=True)
        checks.instance("vocab_group", vocab_group, torch.distributed.ProcessGroup, optional=True)
        autocast, self.shard = checks.autocast_dtype(tokens.like), vocab_group is not None
        self.tokens, self._vocab_size, self._backend = tokens, vocab_size, backend
        self.student: dict[str, Tensor | None] = {}
        self.fixed: dict[str, Tensor | None] = {}
        self.numbers: dict[str, float | None] = {}
        self.options: dict[str, object] = {
            "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
            "vocab_group": group_name(vocab_group) if self.shard else None,
        }
        self._models: list[Tensor] = []
        self._columns: dict[str, int] = {}

    def states(self, name: str, value: Tensor, columns: int | None = None) -> Tensor:
        """Check hidden states or logits [..., D] of the tokens; returns [N, D]."""
        like = self.tokens.like
        checks.tensor(name, value, (*like.shape[:-1], columns), like)
        self._models.append(value.flatten(0, -2))
        return self._models[-1]

    def logits(self, name: str, value: Tensor) -> Tensor:
        """Check logits [..., V] of the tokens; returns [N, V]."""
        rows = self.states(name, value)
        if rows.shape[1] == 0:
            raise ValueError(f"{name} must have at least one column, got shape {tuple(value.shape)}.")
        self._columns[name] = rows.shape[1]
        return rows

    def head(self, name: str, given: Tensor | Head, hidden: Tensor, *loose: Any) -> Head:
        """Check a head of hidden states [..., D], or a bare weight and its (bias, scale, softcap)."""
        head = checks.head(name, given, hidden, *loose, shard=self.shard)
        self._models.append(head.weight)
        self._columns[name] = len(head.weight)
        return head

    def target_row(self, name: str, given: Any) -> TargetRow:
        """Check a row of a target of hidden states; it gets a :class:`Head` of its own."""
        expected = "a TargetRow or (coefficient, hidden, weight[, bias])"
        coefficient, hidden, weight, *rest = checks.sequence(name, given, expected, range(3, 7))
        coefficient, rows = self.coefficient(name, coefficient), self.states(f"{name}.hidden", hidden)
        return TargetRow(coefficient, rows, self.head(f"{name}.weight", weight, hidden, *rest))

    def coefficient(self, name: str, value: float | Tensor) -> float | Tensor:
        """Check a row's coefficient: a number, or one for each token, then [N] in the precision of sums."""
        name = f"{name}.coefficient"
        if isinstance(value, Tensor):
            return checks.per_token(name, value, self.tokens.like).to(self.tokens.dtype)
        return checks.number(name, value)

    def put_head(self, name: str, head: Head, to: dict[str, Tensor | None]) -> None:
        """Pass a head, its tensors among the ``student``'s or the ``fixed`` ones."""
        to |= {f"{name}_weight": head.weight, f"{name}_bias": head.bias}
        self.numbers |= {f"{name}_scale": head.scale, f"{name}_softcap": head.softcap}

    def put_addend(self, index: int, coefficient: float | Tensor, kind: str, values: Tensor) -> None:
        """Pass an addend of a target: its coefficient, and hidden states or logits."""
        to = self.fixed if isinstance(coefficient, Tensor) else self.numbers
        to[f"row{index}_coefficient"] = coefficient
        self.fixed[f"row{index}_{kind}"] = values

    def put_settings(self, settings: VGSObjective | Divergence) -> None:
        """Pass fields that are numbers as such, and the others as lines of the specification."""
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            to = self.options if isinstance(value, (str, bool)) else self.numbers
            to[field.name] = value

    def put_kernel_options(self, workspace_bytes: int, gradient_tolerance: float) -> None:
        """Check and pass how hidden states are to be worked on."""
        self.numbers["workspace_bytes"] = checks.integer("workspace_bytes", workspace_bytes, "> 0")
        tolerance = checks.number("gradient_tolerance", gradient_tolerance, "in [0, 1)")
        self.numbers["gradient_tolerance"] = tolerance if tolerance > 0 else None

    def put_gating(
        self,
        objective: VGSObjective | None,
        vds: Tensor | None,
        vds_threshold: float | Tensor | Sequence[float] | None,
        trajectory_ids: Tensor | None,
    ) -> VGSObjective:
        """Check the objective, and pass what gates the tokens: scores, limits and trajectories."""
        checks.instance("objective", objective, VGSObjective, optional=True)
        objective, like = objective or VGSObjective(), self.tokens.like
        ids = checks.per_token("trajectory_ids", trajectory_ids, like, [torch.int64])
        if objective.vds_scope == "trajectory" and ids is None and vds_threshold is None:
            raise ValueError("trajectory_ids must be given for vds_scope='trajectory', got None.")
        limits = None if vds_threshold is None else _limits(vds_threshold, objective, self.tokens)
        self.fixed |= {"vds": checks.per_token("vds", vds, like), "vds_threshold": limits, "trajectory_ids": ids}
        return objective

    def run(self, loss: str, terms: tuple[str, ...], *, synchronises: bool = False) -> dict[str, Tensor | None]:
        """Run a loss: the fields of its output.

        Args:
            loss: a key of the operators' losses.
            terms: names of its terms; the optional ones follow.
            synchronises: whether the host may have to wait for the device.
        """
        tokens, terms = self.tokens, [*terms, *self.tokens.names]
        # Of a shard only the ranks together can tell.
        vocab = self._vocab_size if self.shard else checks.vocabulary(self._columns, self._vocab_size)
        checks.ids_in_vocabulary("target_ids", tokens.fixed["ids"], tokens.ignored, vocab)
        backend = checks.backend(self._backend, *self._models)
        student, fixed, numbers, options = (
            {name: x for name, x in given.items() if x is not None}
            for given in (
                self.student, self.fixed | tokens.fixed, {**self.numbers, **tokens.numbers, "vocab_size": vocab},
                self.options,
            )
        )  # fmt: skip
        wanted = [name for name, x in student.items() if x.requires_grad and torch.is_grad_enabled()]
        tolerant = bool(wanted) and self.numbers.get("gradient_tolerance") is not None
        if tolerant and not tokens.unreduced:
            terms += SHARES
        synchronises = synchronises or self.shard or tolerant
        spec = specify(
            loss=loss, reduction="none" if tokens.unreduced else "sum", needs=[] if tokens.unreduced else wanted,
            wanted=wanted, student=list(student), fixed=list(fixed), numbers=list(numbers), terms=terms,
            backend=backend, synchronises=synchronises, **options,
        )  # fmt: skip
        operator = operators.synchronising_loss if synchronises else operators.loss
        fixed_tensors = [x.detach() for x in fixed.values()]
        numbers_given = numbers_tensor(list(numbers.values()))
        value, found, *_ = operator(list(student.values()), fixed_tensors, numbers_given, spec)
        found = {name: tokens.shaped(x) for name, x in zip(terms, found.detach(), strict=True)}
        counted = None if tokens.counted is None else tokens.counted.reshape(tokens.shape)
        return {"loss": value.reshape(tokens.shape) if tokens.unreduced else value, **found, "counted": counted}


def _limits(value: float | Tensor | Sequence[float], objective: VGSObjective, tokens: Tokens) -> Tensor:
    """[K] tensor with one limit for each of the objective's quantiles."""
    device, dtype = tokens.like.device, tokens.dtype
    if isinstance(value, Sequence) and any(isinstance(x, Tensor) for x in value):
        value = torch.stack([torch.as_tensor(x, dtype=dtype, device=device).reshape(()) for x in value])
    if isinstance(value, Tensor):
        limits = value.detach().to(device, dtype).reshape(-1)
    else:
        values = [checks.number("vds_threshold", x) for x in (value if isinstance(value, Sequence) else [value])]
        if any(low > high for low, high in pairwise(values)):
            raise ValueError(f"vds_threshold must be a pair (low, high) with low <= high, got {tuple(values)}.")
        limits = numbers_tensor(values).to(device, dtype, non_blocking=True)
    wanted = len(objective.quantiles)
    if len(limits) != wanted:
        kind = "a pair (low, high)" if wanted == 2 else "one number"
        raise ValueError(f"vds_threshold must be {kind} for schedule={objective.schedule!r}, got {len(limits)} values.")
    return limits
