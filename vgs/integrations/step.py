"""A host's batch through both models: the teacher once over all of it, then the student in the host's micro-batches.

The gate's threshold is a quantile over tokens. It is found when the teacher has read the whole batch, on all ranks, and
every micro-batch is given it: so the loss and its gradient do not depend on how the host cuts the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vgs_kernels import DivergenceOutput, VGSOutput

from ..errors import ConfigError
from ..models.forward import score_with_anchor
from ..models.groups import PromptGroup, response_ids, trajectory_ids
from ..models.heads import Head, read_head, visual_dependency, whole_heads
from ..models.wrappers import run_inside, unwrap
from ..objectives.definitions import shared_limits
from ..objectives.weighting import token_weights
from ..teachers.protocol import TeacherRows
from .options import HostOptions
from .rows import merge_rows

VIEWS = ("image", "text")


@dataclass(frozen=True)
class HostRows:
    """Responses that a host has sampled, B rows on this rank.

    Attributes:
        rows: groups of one response each, see ``rows.host_row``.
        live: of every row [T] bool, the tokens that the student sampled; others (a tool's words) are not scored.
        names: of every row the name of its prompt; rows of one name share it where it is the same.
    """

    rows: list[PromptGroup]
    live: list[Tensor]
    names: list[Any]

    def __post_init__(self) -> None:
        for number, (row, live) in enumerate(zip(self.rows, self.live, strict=True)):
            if len(live) != len(row.responses[0]):
                tokens = len(row.responses[0])
                raise ConfigError(f"row {number} has {tokens} response tokens, but a mask of {len(live)}.")

    @cached_property
    def lengths(self) -> list[int]:
        """Live tokens of every row."""
        return [int(live.sum()) for live in self.live]


@dataclass(frozen=True)
class Scored:
    """Rows that the teacher has read.

    Attributes:
        batch: the rows.
        teacher: of every row what the loss needs of the teacher, of the live tokens.
        head: the teacher's.
        limits: [K] thresholds of the gate; None where the loss has no gate, or each response its own.
    """

    batch: HostRows
    teacher: list[TeacherRows]
    head: Head
    limits: Tensor | None


@dataclass(frozen=True)
class Pass:
    """Some rows as one forward sees them: the groups, and the numbers of the rows in the order of their responses."""

    groups: list[PromptGroup]
    order: list[int]
    live: Tensor

    @property
    def trajectories(self) -> Tensor:
        """[N] int64: which of the pass's responses each live token belongs to."""
        return trajectory_ids(self.groups)[self.live]


class HostStep:
    """The method on models that a host holds.

    Args:
        options: of the run.
        anchor: a prompt with a small image, which joins passes without images on several ranks (all must run the vision
            tower); None for one rank.
        autocast: makes the context that both models run in.
    """

    def __init__(
        self,
        options: HostOptions,
        anchor: PromptGroup | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.options, self.anchor, self.autocast = options, anchor, autocast
        self.preset, self.objective = options.resolved()
        self._gated = self.preset.needs_vds(self.objective, split=True)

    @property
    def _terms(self) -> bool:
        return self.options.return_terms and self.preset.has_terms

    def _pass(self, batch: HostRows, chosen: Sequence[int]) -> Pass:
        names = [batch.names[number] if self.options.share_prompts else number for number in chosen]
        groups, order = merge_rows([batch.rows[number] for number in chosen], names)
        numbers = [chosen[index] for index in order]
        live = [batch.live[number] for number in numbers]
        return Pass(groups, numbers, torch.cat(live) if live else torch.zeros(0, dtype=torch.bool))

    def _score(
        self, model: nn.Module, part: Pass, text: bool, text_gradient: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [N, D] of the live tokens of each view, and the anchor's zero."""
        states, zero = score_with_anchor(
            model,
            part.groups,
            self.anchor,
            text=text,
            text_gradient=text_gradient,
            share_prefix=self.options.share_prompts,
            kernel=self.options.kernel,
        )
        return [x[part.live.to(x.device)] for x in states], zero

    # ---- the teacher

    @torch.no_grad()
    def score_teacher(self, teacher: nn.Module, batch: HostRows, passes: Sequence[Sequence[int]]) -> Scored:
        """Read a batch with the teacher, and keep what the student's passes will need of it.

        Args:
            teacher: as it is held: bare, or FSDP2 (then all ranks must call with as many passes).
            batch: all rows of this rank.
            passes: numbers of the rows that go together, each row once.
        """
        found: dict[int, TeacherRows] = {}
        text = self._terms or self._gated or self.preset.needs_text(self.objective)
        model, head = unwrap(teacher), _kept_head(teacher)

        def task() -> tuple[None, tuple[list[Tensor], Tensor | None]]:
            with self.autocast():
                states, _ = self._score(model, part, text, False)
                if not self._gated:
                    return None, (states, None)
                cast = _cast_head(head, states[0].device, states[0].dtype)
                vds = visual_dependency(states, cast, self.objective.temperature, **self.options.loss_options)
                return None, (states, vds)

        for chosen in passes:
            part = self._pass(batch, chosen)
            _, (states, vds) = run_inside(teacher, task)
            lengths = [batch.lengths[number] for number in part.order]
            views = {view: x.split(lengths) for view, x in zip(VIEWS, states, strict=False)}
            scores = [None] * len(lengths) if vds is None else vds.split(lengths)
            for place, number in enumerate(part.order):
                found[number] = TeacherRows({view: x[place] for view, x in views.items()}, scores[place])
        _reshard(teacher)
        rows = [found[number] for number in range(len(batch.rows))]
        return Scored(batch, rows, head, self._shared_limits(batch, rows, head.weight) if self._gated else None)

    def _shared_limits(self, batch: HostRows, teacher: Sequence[TeacherRows], like: Tensor) -> Tensor | None:
        """[K] thresholds of the whole batch, on all ranks; None where every response has its own."""
        vds = torch.cat([like.new_zeros(0, dtype=torch.float32), *(entry.vds for entry in teacher)])
        lengths = torch.tensor(batch.lengths, dtype=torch.int64)
        trajectories = torch.arange(len(lengths)).repeat_interleave(lengths).to(vds.device)
        return shared_limits(vds, self.objective, trajectories)[1]

    # ---- the student

    def count(self, lengths: Sequence[int]) -> int:
        """What the loss is the mean over, of responses with these lengths: tokens, or responses that have some."""
        return sum(lengths) if self.options.reduction == "token" else sum(length > 0 for length in lengths)

    def student_loss(
        self, student: nn.Module, scored: Scored, chosen: Sequence[int], num_items: float
    ) -> tuple[Tensor, VGSOutput | DivergenceOutput]:
        """The loss of some rows of the batch that the teacher has read; call ``backward`` on it before the next.

        Args:
            student: as the host holds it.
            scored: of ``score_teacher``.
            chosen: numbers of the rows.
            num_items: what the sum is divided by, of ``count``; see ``vgs_step`` for hosts that average over ranks.

        Returns:
            The loss, 0-d float32 with the graph through the student's wrapper; and the detached terms [N] of the live
            tokens.
        """
        part, model = self._pass(scored.batch, chosen), unwrap(student)
        text = self._terms or self.preset.needs_own_text(self.objective)
        teacher = [scored.teacher[number] for number in part.order]
        lengths = [scored.batch.lengths[number] for number in part.order]
        weights = token_weights(lengths, self.options.reduction, max(num_items, 1e-9))

        def task() -> tuple[Tensor, VGSOutput | DivergenceOutput]:
            with self.autocast():
                states, zero = self._score(model, part, text, self.preset.needs_text_gradient(self.objective))
                with whole_heads(model):
                    head = read_head(model, states[0].dtype)
                    device, dtype = head.weight.device, states[0].dtype

                    def placed(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
                        return torch.cat(pieces).to(device) if pieces else like.new_zeros(0, *like.shape[1:])

                    views = {view: x.to(device) for view, x in zip(VIEWS, states, strict=False)}
                    width = scored.head.weight.new_zeros(0, scored.head.weight.shape[1])
                    q = {v: placed([x.rows[v] for x in teacher], width).to(device, dtype) for v in views}
                    steering = {}
                    if self._gated:
                        steering["vds"] = placed([entry.vds for entry in teacher], torch.zeros(0)).to(device)
                    if scored.limits is not None:
                        steering["vds_threshold"] = scored.limits.to(device)
                    ids = response_ids(part.groups)[part.live].to(device) if self.preset.needs_ids else None
                    output = self.preset.loss(
                        views,
                        q,
                        head,
                        _cast_head(scored.head, device, dtype),
                        objective=self.objective,
                        token_weights=placed(weights, torch.zeros(0)).to(device),
                        target_ids=ids,
                        trajectory_ids=part.trajectories.to(device),
                        return_terms=self._terms,
                        **steering,
                        **self.options.loss_options,
                    )
            return output.loss if zero is None else output.loss + zero, output

        return run_inside(student, task)


def _reshard(teacher: nn.Module) -> None:
    """What the forward of an FSDP2 model has gathered and kept is given back."""
    if isinstance(teacher, FSDPModule):
        teacher.reshard()


def _kept_head(teacher: nn.Module) -> Head:
    """The teacher's whole head, gathered here once, which stays when its model is sharded or leaves the device."""
    model = unwrap(teacher)
    _reshard(teacher)  # a weight that a forward has gathered is lent
    with whole_heads(model):
        head = read_head(model, next(model.parameters()).dtype)
        return replace(head, weight=head.weight.detach(), bias=None if head.bias is None else head.bias.detach())


def _cast_head(head: Head, device: torch.device, dtype: torch.dtype) -> Head:
    bias = None if head.bias is None else head.bias.to(device, dtype)
    return replace(head, weight=head.weight.to(device, dtype), bias=bias)


def sums(output: VGSOutput | DivergenceOutput) -> dict[str, Tensor]:
    """Sums over the tokens of a pass, 0-d, of all terms that its loss formed: what a host can add up and divide.

    Args:
        output: of ``HostStep.student_loss``.
    """
    terms = {name: value for name, value in vars(output).items() if name != "loss" and isinstance(value, Tensor)}
    return {name: value.float().sum() for name, value in terms.items()}
