"""Where a step's time goes: seconds of its phases, logged beside the host's ``step_time``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

#: In front of a phase's name in the log. ``step_time`` holds all phases but the optimizer's; what they leave is the
#: student's.
PREFIX = "step_time_"


class StepClock(TrainerCallback):
    """Adds up the seconds of each phase over an optimizer step, and logs them when it ends.

    Args:
        record: takes the name of a metric and its value.
    """

    def __init__(self, record: Callable[[str, float], None]) -> None:
        self._record = record
        self._seconds: dict[str, float] = {}
        self._optimizer_began = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside counts as the phase; of a GPU, all that it was given."""
        began = time.perf_counter()
        yield
        self._add(name, began)

    def _add(self, name: str, began: float) -> None:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self._optimizer_began = time.perf_counter()

    def on_optimizer_step(self, *_: object, **__: object) -> None:
        self._add("optimizer", self._optimizer_began)
        for name in self._seconds:  # a phase that this step did without took no time
            self._record(PREFIX + name, self._seconds[name])
            self._seconds[name] = 0.0
