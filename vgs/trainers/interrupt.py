"""SIGTERM and SIGINT: the step is finished, a checkpoint saved, and the run ends so that a scheduler can requeue it."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and stops at the end of the step in which a signal arrives; a second one ends the run at once.

    All ranks stop after the same step, whichever of them is told: at the end of every step they ask each other, for a
    rank that saves alone would wait for the others for ever.

    Args:
        every: optimizer steps between places where a run can be resumed exactly; it stops at the next of them.

    Attributes:
        received: the signal, or None.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as of a process that it has ended; 0 without one."""
        return 0 if self.received is None else 128 + self.received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._give_back()  # so that a second signal does what it always did
        logger.warning("%s: a checkpoint will be saved at the end of this step.", self.received.name)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._anywhere(args.device) and state.global_step % self.every == 0:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._give_back()

    def _anywhere(self, device: torch.device) -> bool:
        """Whether any rank has received a signal; the others take it for theirs."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.received is not None
        number = torch.tensor(self.received or 0, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if number and self.received is None:
            self.received = signal.Signals(int(number))
        return bool(number)
