"""A training step in several ways, cut into phases that a clock or a memory meter can stand around."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vgs.models.families import device_of
from vgs.models.forward import fused_loss, score_groups
from vgs.models.groups import PromptGroup, response_lengths
from vgs.models.heads import read_head, visual_dependency
from vgs.models.padding import pad_groups
from vgs.models.states import padded_states, score_padded
from vgs_kernels import VGSObjective
from vgs_kernels.gating import thresholds

from .jobs import JOBS
from .methods import METHODS as LOSSES
from .methods import Context
from .problem import Problem
from .step_problem import response_tokens

#: What a step consists of, sampling aside. The heads belong to the loss.
PHASES = ("teacher", "student", "loss", "backward", "optimizer")

Batch = Sequence[PromptGroup]


class Phase(Protocol):
    """Calls a function as a part of the named phase and returns its result."""

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any: ...


def unmeasured(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """A ``Phase`` that only calls."""
    return function(*arguments, **options)


@dataclass
class Step:
    """What every method works on.

    Attributes:
        student, teacher: the models; the teacher frozen.
        batches: the groups of each pass with gradient, their pixels where the models are.
        device: ``"cpu"`` or ``"cuda"``.
        autocast: dtype of the passes and of the losses, None without autocast.
        optimizer: of the student's parameters.
    """

    student: nn.Module
    teacher: nn.Module
    batches: list[Batch]
    device: str
    autocast: torch.dtype | None
    optimizer: torch.optim.Optimizer

    @property
    def tokens(self) -> int:
        """Response tokens of the step."""
        return sum(response_tokens(batch) for batch in self.batches)

    def computing(self) -> contextlib.AbstractContextManager:
        """The context of the models' passes and of the losses."""
        return torch.autocast(self.device, self.autocast, enabled=self.autocast is not None)

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Both heads, [V, Ds] and [V, Dt]."""
        return tuple(model.get_output_embeddings().weight for model in (self.student, self.teacher))

    def optimize(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()


@dataclass(frozen=True)
class Method:
    """A way to take the gradients of a step.

    Attributes:
        title: for tables and legends.
        run: leaves the gradients of the mean over all response tokens, returns that mean.
        objective: of the loss; without its text-only terms, plain distillation.
        packed: one row without padding, instead of padded batches.
        fused: with our loss, which forms no logits.
        shared: whether the responses of a prompt share it.
    """

    title: str
    run: Callable[[Method, Step, Phase], Tensor]
    objective: VGSObjective
    packed: bool = False
    shared: bool = False
    fused: bool = False

    @property
    def text(self) -> bool:
        """Whether the text-only view is scored."""
        return self.objective.gamma > 0 or self.objective.lam > 0


def _score(step: Step, model: nn.Module, score: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with step.computing(), torch.set_grad_enabled(model is step.student):
        return score(model, *arguments, **options)


def _padded(model: nn.Module, batch: Batch, views: Sequence[str], device: str) -> tuple[Tensor, ...]:
    """One padded pass for each view."""
    return tuple(padded_states(model, pad_groups(batch, view, device)) for view in views)


def _loss(step: Step, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    with step.computing():
        return function(*arguments)


def plain_loss_name(device: str) -> str:
    """The loss of plain distillation: TRL's own where it is installed, else ours."""
    return "trl" if LOSSES["trl"].missing(device) is None else "ours"


def _run_padded(method: Method, step: Step, phase: Phase) -> Tensor:
    """Batch by batch, as trainers do: both models, the loss, the backward."""
    views = ("multimodal", "text") if method.text else ("multimodal",)
    name, job = ("eager", "vgs") if method.text else (plain_loss_name(step.device), "reverse-kl")
    total = torch.zeros((), device=step.device)
    for batch in step.batches:
        teacher, student = (
            phase(part, _score, step, model, _padded, batch, views, step.device)
            for part, model in (("teacher", step.teacher), ("student", step.student))
        )
        # Plain losses read the first view alone.
        problem = Problem(student[0], student[-1], teacher[0], teacher[-1], *step.weights)
        mean = LOSSES[name].make(Context(problem, JOBS[job], None))
        loss = phase("loss", _loss, step, mean, problem) * (response_tokens(batch) / step.tokens)
        phase("backward", loss.backward)
        total += loss.detach()
    return total


@torch.no_grad()
def _gate(step: Step, rows: Sequence[Sequence[Tensor]], objective: VGSObjective) -> tuple[Tensor, Tensor]:
    """[N] visual dependency of every token of the step, and its threshold."""
    head = read_head(step.teacher, rows[0][0].dtype)
    with step.computing():
        vds = torch.cat([visual_dependency(part, head, objective.temperature) for part in rows])
    return vds, thresholds(vds, objective)[-1][0]


def _gated_responses(gate: Tensor, batch: Batch) -> list[bool]:
    return [bool(part.any()) for part in gate.cpu().split(response_lengths(batch))]


def _fused(
    step: Step, student: Sequence[Tensor], teacher: Sequence[Tensor], objective: VGSObjective, gate: dict[str, Tensor]
) -> Tensor:
    """This batch's share of the mean over the step."""
    heads = read_head(step.student, student[0].dtype), read_head(step.teacher, teacher[0].dtype)
    weights = torch.full((len(student[0]),), 1 / step.tokens, device=step.device)
    options = {"token_weights": weights, "return_terms": objective.lam > 0}
    return fused_loss(student, teacher, *heads, objective, **options, **gate).loss


def _fallback(
    model: nn.Module, batch: Batch, *, text: bool, share_prefix: bool, text_gradient: Sequence[bool] | bool = True
) -> tuple[Tensor, ...]:
    """As ``score_groups`` where packed rows are not exact: each response with a copy of its prompt and images."""
    wanted = [text_gradient] * len(response_lengths(batch)) if isinstance(text_gradient, bool) else text_gradient
    device = device_of(model)
    return score_padded(model, batch, text, wanted, device, share_images=share_prefix)


def _run_fused(method: Method, step: Step, phase: Phase) -> Tensor:
    """The teacher over the whole step, the gate, then batch by batch the student, the loss, the backward."""
    objective = method.objective
    options = {"text": method.text, "share_prefix": method.shared}
    score = score_groups if method.packed else _fallback
    teacher = [phase("teacher", _score, step, step.teacher, score, batch, **options) for batch in step.batches]
    gates: list[dict[str, Tensor]] = [{} for _ in step.batches]
    if objective.lam > 0:
        vds, threshold = phase("loss", _gate, step, teacher, objective)
        parts = vds.split([response_tokens(batch) for batch in step.batches])
        gates = [{"vds": part, "vds_threshold": threshold} for part in parts]
    total = torch.zeros((), device=step.device)
    for batch, rows, gate in zip(step.batches, teacher, gates, strict=True):
        needed = _gated_responses(gate["vds"] > gate["vds_threshold"], batch) if gate else False
        student = phase("student", _score, step, step.student, score, batch, text_gradient=needed, **options)
        loss = phase("loss", _loss, step, _fused, step, student, rows, objective, gate)
        phase("backward", loss.backward)
        total += loss.detach()
    return total


_PLAIN, _VGS = JOBS["reverse-kl"].objective, JOBS["vgs"].objective
_FOLDED = JOBS["vgs-folded"].objective
_PACKED = {"packed": True, "fused": True}
METHODS = {
    "plain": Method("plain, padded (as TRL)", _run_padded, _PLAIN),
    "vgs-naive": Method("VGS naive (paper): padded, all logits", _run_padded, _VGS),
    "vgs-padded": Method("VGS, padded (family not packed)", _run_fused, _VGS, fused=True),
    "vgs": Method("VGS, packed", _run_fused, _VGS, **_PACKED),
    "vgs-shared": Method("VGS, packed, prefix shared", _run_fused, _VGS, shared=True, **_PACKED),
    "plain-shared": Method("plain, packed, prefix shared", _run_fused, _PLAIN, shared=True, **_PACKED),
    "vgs-shared-lam0": Method("VGS, lam 0, packed, prefix shared", _run_fused, _FOLDED, shared=True, **_PACKED),
}


def differing(generations: int) -> tuple[str, ...]:
    """The methods that differ with so many responses a prompt: a single one has nothing to share."""
    if generations > 1:
        return tuple(name for name in METHODS if name != "vgs-padded")
    return "plain", "vgs-naive", "vgs", "plain-shared"
