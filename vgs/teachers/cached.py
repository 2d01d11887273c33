"""A teacher whose hidden states of recorded responses are in a cache, with or without a live one for all others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from ..models.groups import PromptGroup, response_lengths, select_responses
from ..models.heads import Head
from .cache import VIEWS, StateCache
from .fingerprints import prompt_fingerprint
from .local import KeptHead
from .protocol import Teacher, TeacherFacts, Then


@dataclass
class CachedTeacher:
    """Looks up what was computed before.

    Attributes:
        cache: the states.
        device: where they are wanted.
        live: scores responses that are not in the cache; its device is asked for only if there are some. None: such a
            response is an error.
        sharded: see ``protocol.Teacher``; a live teacher must not be.
    """

    cache: StateCache
    device: torch.device
    live: Teacher | None = None
    sharded: bool = False
    _kept: KeptHead | None = field(init=False, default=None)
    _stack: ExitStack | None = field(init=False, default=None)
    _live_is_ready: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        if self.live is None:
            self._kept = KeptHead(self.cache.head(self.device))

    @property
    def facts(self) -> TeacherFacts:
        return self.cache.facts

    @contextmanager
    def ready(self) -> Iterator[None]:
        with ExitStack() as self._stack:
            self._live_is_ready = False
            yield

    def states(self, groups: list[PromptGroup], text: bool, then: Then) -> dict[str, Tensor]:
        views = VIEWS if text else VIEWS[:1]
        keys = [prompt_fingerprint(group) for group in groups]
        found = [
            self.cache.find(key, response)
            for key, group in zip(keys, groups, strict=True)
            for response in group.responses
        ]
        missing = [index for index, states in enumerate(found) if states is None]
        if missing:
            for index, states in zip(missing, self._ask(groups, missing, text), strict=True):
                found[index] = states
        rows = [torch.cat([states[view].to(self.device) for states in found]) for view in views]
        return then(rows)

    def _ask(self, groups: list[PromptGroup], missing: list[int], text: bool) -> list[dict[str, Tensor]]:
        """What the live teacher says of some responses."""
        if self.live is None:
            raise ConfigError(
                f"{self.facts.what} has no states of {len(missing)} responses of a batch, and there is no other "
                "teacher: it was made of other prompts or responses. Make it anew, or give a path beside it."
            )
        if not self._live_is_ready:
            self._stack.enter_context(self.live.ready())
            self._live_is_ready = True
        part = select_responses(groups, missing)
        columns = self.live.states(part, text, lambda rows: dict(zip(VIEWS, rows, strict=False)))
        lengths = response_lengths(part)
        pieces = {view: values.split(lengths) for view, values in columns.items()}
        return [{view: pieces[view][index] for view in pieces} for index in range(len(missing))]

    def head(self, dtype: torch.dtype) -> AbstractContextManager[Head]:
        return self._kept.whole() if self.live is None else self.live.head(dtype)
