"""Checkpoints that a trainer writes whole or not at all, and runs that continue from them exactly.

What the host leaves out of a checkpoint is added to it; ``checkpoints`` has the files' side.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import ConfigError
from .checkpoints import (
    MANIFEST,
    STAGING,
    appear,
    clear_leftovers,
    find_damage,
    newest_complete_checkpoint,
    rotate,
    write_manifest,
)

logger = logging.getLogger(__name__)


class CheckpointPart(Protocol):
    """Something of a run that its checkpoints hold too."""

    def save(self, folder: str) -> None:
        """Write it into a checkpoint; every process calls this."""

    def load(self, folder: str) -> None:
        """Take it from a checkpoint; every process calls this."""


class ExactResume:
    """Atomic checkpoints for a trainer, and a resume that continues bit for bit.

    A checkpoint gains, for each process, what the host keeps in memory only (``HostHooks.unsaved_state``), whether the
    epoch that ends with its step has been closed, and ``parts``. ``HostHooks`` calls the methods.

    Args:
        trainer: with ``HostHooks`` in front of its host.

    Attributes:
        parts: what else is in the checkpoints.
        staging: whether a checkpoint is being written.
        pending: the checkpoint whose progress is still to be restored.
        began: when the run began, in seconds of ``time.time``, without the pauses between kill and resume.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.parts: list[CheckpointPart] = []
        self.staging = False
        self.pending: str | None = None
        self.began = 0.0
        self._progress: Mapping[str, Any] = {}  # what a checkpoint holds beyond the host's files
        self._complete_epochs = 0
        self._visited = 0  # the step after which the host last asked what to log, evaluate and save
        self._epoch_closed = False
        # The gradient's norm and the learning rate of the last step, for the log.
        self._last_step: tuple[float | None, float | None] = (None, None)

    # ---- choosing

    def choose(self, wanted: str | Path | bool | None) -> str | None:
        """The checkpoint to resume from, the same on all processes; leftovers of a killed run are cleared before.

        Args:
            wanted: a checkpoint's folder, or True for the newest complete one; else none.

        Raises:
            ConfigError: the given checkpoint does not exist or is damaged.
        """
        trainer = self.trainer
        if trainer.args.should_save:
            clear_leftovers(trainer.args.output_dir)
        trainer.accelerator.wait_for_everyone()
        outcome: list[str | None] = [None, None]
        if trainer.accelerator.is_main_process and wanted:
            try:
                outcome[0] = self._find(wanted)
            except (ValueError, OSError) as error:  # raised by every process, so that none waits for the others
                outcome[1] = str(error)
        checkpoint, problem = broadcast_object_list(outcome)
        if problem is not None:
            raise ConfigError(problem)
        return checkpoint

    def _find(self, wanted: str | Path | bool) -> str | None:
        output_dir = self.trainer.args.output_dir
        if wanted is True:
            newest = newest_complete_checkpoint(output_dir)
            if newest is not None:
                return str(newest)
            # An error, as from the host, would never let a scheduler begin that always starts the same command.
            logger.warning("%s has no complete checkpoint: training starts from the beginning.", output_dir)
            return None
        if not Path(wanted).is_dir():
            raise ConfigError(f"resume_from_checkpoint must be the folder of a checkpoint, got {str(wanted)!r}.")
        if not (Path(wanted) / MANIFEST).exists():
            logger.warning("The checkpoint %s has no %s: whether it is complete is unknown.", wanted, MANIFEST)
        elif damage := find_damage(Path(wanted)):
            raise ConfigError(f"resume_from_checkpoint must be a complete checkpoint, but in {str(wanted)!r} {damage}.")
        return str(wanted)

    # ---- saving

    def output_dir(self, run_dir: str) -> str:
        """Where the host writes checkpoints: the run's folder, or below it while a checkpoint is staged."""
        return os.path.join(run_dir, STAGING) if self.staging else run_dir

    @contextmanager
    def saving(self, run_dir: Path) -> Iterator[Path]:
        """The host writes a checkpoint inside; it appears under its name afterwards, and old ones go.

        Yields:
            The checkpoint's final folder.
        """
        trainer = self.trainer
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        staged = run_dir / STAGING / final.name
        self.staging = True
        try:
            yield final
            best = trainer.state.best_model_checkpoint
            if best is not None and Path(best) == staged:
                trainer.state.best_model_checkpoint = str(final)
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                write_manifest(staged)
                appear(staged, final)
        except BaseException:
            shutil.rmtree(staged.parent, ignore_errors=True)
            logger.error("%s could not be saved; earlier checkpoints are as they were.", final)
            raise
        finally:
            self.staging = False
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            rotate(final, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"progress_{self.trainer.args.process_index}.pt"

    def save(self, folder: str) -> None:
        """Add to a checkpoint what the host leaves out."""
        progress = {
            "processes": self.trainer.args.world_size,
            "seconds": time.time() - self.began,
            "epoch_closed": self._epoch_closed,
            "last_step": self._last_step,
            **self.trainer.unsaved_state(),
        }
        torch.save(progress, self._progress_file(folder))
        for part in self.parts:
            part.save(folder)

    # ---- resuming

    def begin(
        self,
        checkpoint: str | None,
        position: tuple[int, int],
        max_steps: int,
        steps_per_epoch: int,
        num_train_epochs: int,
    ) -> tuple[int, int]:
        """A training begins, with the host's state of the checkpoint loaded.

        Args:
            checkpoint: the one that is resumed; None for none.
            position: where the host would go on: epochs done, and micro-batches of the next one.
            max_steps, steps_per_epoch, num_train_epochs: of the run; steps are the optimizer's.

        Returns:
            Where it goes on: before the end of an epoch that the checkpoint had not closed yet.
        """
        done = self.trainer.state.global_step
        self.pending, self._visited, self._complete_epochs, self._progress = checkpoint, done, position[0], {}
        self.began = time.time()
        if checkpoint is None:
            return position
        self._progress = self._load_progress(checkpoint)
        if self._progress.get("epoch_closed", True) or self.trainer.args.ignore_data_skip:
            return (num_train_epochs, 0) if done >= max_steps else position
        if done >= max_steps or position[1] == 0:  # the epoch's steps are all done, but not what follows the last
            return (done - 1) // steps_per_epoch, steps_per_epoch * self.trainer.args.gradient_accumulation_steps
        return position

    def _load_progress(self, checkpoint: str) -> Mapping[str, Any]:
        path, processes = self._progress_file(checkpoint), self.trainer.args.world_size
        progress = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if progress.get("processes") == processes:
            return progress
        if self.trainer.accelerator.is_main_process:
            message = "%s lacks the progress of %d process(es): training continues, but not exactly."
            logger.warning(message, checkpoint, processes)
        return {}

    def skip_epochs(self, train_dataloader: DataLoader) -> None:
        """Draw the order of the epochs that are done: the host's sampler draws the permutation of each epoch from one
        generator, which a new process starts anew."""
        for _ in range(self._complete_epochs):
            next(iter(train_dataloader.batch_sampler))

    @contextmanager
    def step_closed(
        self, grad_norm: Tensor | float | None, learning_rate: float | None
    ) -> Iterator[tuple[Tensor | float | None, float | None]]:
        """The host logs, evaluates and saves inside: after every step and, with no further step, after an epoch.

        Yields:
            The last step's gradient norm and learning rate, also where a run is resumed after it.
        """
        state = self.trainer.state
        self._epoch_closed = self._visited == state.global_step
        if learning_rate is None:  # resumed after the last step of the epoch
            grad_norm, learning_rate = self._progress.get("last_step", (grad_norm, None))
        self._last_step = None if grad_norm is None else float(grad_norm), learning_rate
        yield grad_norm, learning_rate
        self._visited = state.global_step

    def restore(self) -> None:
        """Take over the pending checkpoint's progress, once; the training loop is about to go on."""
        if self.pending is None:
            return
        trainer, (checkpoint, self.pending) = self.trainer, (self.pending, None)
        trainer.restore_rng_state(checkpoint)
        trainer.control.should_training_stop |= trainer.state.global_step >= trainer.state.max_steps
        if self._progress:
            self.began -= self._progress["seconds"]
            trainer.restore_unsaved_state(self._progress)
        for part in self.parts:
            part.load(checkpoint)
