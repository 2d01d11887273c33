"""A teacher that runs in this process: always on its device, in host memory between its phases, or read from disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..models.families import placeholder_ids
from ..models.forward import score_with_anchor
from ..models.groups import PromptGroup
from ..models.heads import Head, head_parameters, read_head, whole_heads
from ..models.vocabulary import head_rows
from ..models.wrappers import run_inside, unwrap
from .protocol import TeacherFacts, Then


def facts_of(model: nn.Module, what: str = "teacher_model") -> TeacherFacts:
    """What a run must know of an unwrapped model."""
    return TeacherFacts(what, head_rows(model.config), placeholder_ids(model.config))


class Offload:
    """Keeps a frozen model's weights, but for some, in host memory, and lends them to the device.

    The host copy (pinned where the device is CUDA) is made once; leaving the device copies nothing back.

    Args:
        model: the model.
        resident: parameters that stay on the device.
        device: where all of the model is.

    Raises:
        ValueError: the model is not on ``device`` alone.
    """

    def __init__(self, model: nn.Module, resident: Sequence[nn.Parameter], device: torch.device) -> None:
        if others := {str(p.device) for p in model.parameters() if p.device != device}:
            raise ValueError(
                f"teacher_offload=True needs the whole teacher on {device} to begin with, but parameters are on "
                f"{', '.join(sorted(others))}. Load it without a device_map, or in 8 bits instead."
            )
        kept = {id(parameter) for parameter in resident}
        self._parameters = [p for p in model.parameters() if id(p) not in kept]
        self._device = device
        pin = device.type == "cuda"
        self._host = [p.data.cpu().pin_memory() if pin else p.data for p in self._parameters]
        self._leave()

    def _leave(self) -> None:
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The whole model is on the device inside."""
        for parameter, host in zip(self._parameters, self._host, strict=True):
            parameter.data = host.to(self._device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._leave()


@dataclass
class LocalTeacher:
    """A model in this process.

    Attributes:
        model: the teacher as the run holds it (prepared by accelerate, or bare), in evaluation mode.
        anchor: a prompt with a small image, which joins passes without any where ``sharded``.
        share_prefix, kernel: of packed rows, see ``vgs.models.forward.score_groups``.
        sharded, facts: see ``protocol.Teacher``; facts None: those of the model.
        offload: holds the weights in host memory between the phases; None: they stay where they are.
    """

    model: nn.Module
    anchor: PromptGroup | None = None
    share_prefix: bool = True
    kernel: str = "auto"
    sharded: bool = False
    facts: TeacherFacts | None = None
    offload: Offload | None = None

    def __post_init__(self) -> None:
        if self.facts is None:
            self.facts = facts_of(self.unwrapped)

    @property
    def unwrapped(self) -> nn.Module:
        """The model without its wrappers."""
        return unwrap(self.model)

    def offloaded(self, device: torch.device) -> LocalTeacher:
        """This teacher with its weights, but for the head, in host memory between its phases."""
        return replace(self, offload=Offload(self.unwrapped, head_parameters(self.unwrapped), device))

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.offload.on_device() if self.offload else nullcontext():
            yield

    @torch.no_grad()
    def states(self, groups: list[PromptGroup], text: bool, then: Then) -> dict[str, Tensor]:
        def score() -> tuple[None, dict[str, Tensor]]:
            rows, _ = score_with_anchor(
                self.unwrapped,
                groups,
                self.anchor if self.sharded else None,
                text=text,
                text_gradient=False,
                share_prefix=self.share_prefix,
                kernel=self.kernel,
            )
            return None, then(rows)

        _, columns = run_inside(self.model, score)
        return columns

    @contextmanager
    def head(self, dtype: torch.dtype) -> Iterator[Head]:
        with whole_heads(self.unwrapped):
            yield read_head(self.unwrapped, dtype)


@dataclass(frozen=True)
class KeptHead:
    """A head that stays when its model goes.

    Attributes:
        value: the head, with tensors of its own.
    """

    value: Head

    @classmethod
    def of(cls, model: nn.Module) -> KeptHead:
        """The head of an unwrapped model."""
        head = read_head(model, model.get_input_embeddings().weight.dtype)
        bias = None if head.bias is None else head.bias.detach().clone()
        return cls(replace(head, weight=head.weight.detach().clone(), bias=bias))

    @contextmanager
    def whole(self) -> Iterator[Head]:
        """The head, as ``protocol.Teacher.head`` gives it."""
        yield self.value


@dataclass
class ReloadedTeacher:
    """A model that is read from disk for each of its phases and given up after it; only its head stays.

    Attributes:
        load: reads the model, onto its device and in evaluation mode.
        kept: its head.
        facts, sharded: see ``protocol.Teacher``.
        anchor, share_prefix, kernel: as of ``LocalTeacher``.
    """

    load: Callable[[], nn.Module]
    kept: KeptHead
    facts: TeacherFacts
    anchor: PromptGroup | None = None
    share_prefix: bool = True
    kernel: str = "auto"
    sharded: bool = False
    _here: LocalTeacher | None = field(init=False, default=None)

    @contextmanager
    def ready(self) -> Iterator[None]:
        self._here = LocalTeacher(self.load(), self.anchor, self.share_prefix, self.kernel, facts=self.facts)
        try:
            yield
        finally:
            self._here = None

    def states(self, groups: list[PromptGroup], text: bool, then: Then) -> dict[str, Tensor]:
        return self._here.states(groups, text, then)

    def head(self, dtype: torch.dtype) -> AbstractContextManager[Head]:
        return self.kept.whole()
