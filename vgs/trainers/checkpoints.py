"""Checkpoints that appear whole or not at all, and runs that continue from them exactly.

A checkpoint is written below ``_saving``, listed with sizes and checksums in its ``manifest.json``, flushed to the
disk and only then renamed to ``checkpoint-N``. What the host leaves out of a checkpoint is added to it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, sort_checkpoints

from ..errors import ConfigError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Not "checkpoint-*", which trainers look for; a leading "_" is what the host does not upload.
STAGING, TRASH = "_saving", "_deleting"
CHUNK_BYTES = 2**22


def check_writable(output_dir: str | Path) -> None:
    """Create a folder where it is missing, and try to write a file there.

    Raises:
        ValueError: neither is possible.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir) as file:
            file.write(b"x")
    except OSError as error:
        raise ValueError(
            f"output_dir must be a folder that can be written to, got {str(output_dir)!r} ({error.strerror or error})."
        ) from error


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_manifest(folder: Path) -> None:
    """Write a folder's ``manifest.json``, and flush all to the disk.

    It holds the time, ``saved``, and ``files``: relative name -> [bytes, CRC-32].
    """
    manifest = folder / MANIFEST
    manifest.unlink(missing_ok=True)
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file()]
    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(_checksum, files))
        sizes = [path.stat().st_size for path in files]
        names = [path.relative_to(folder).as_posix() for path in files]
        entries = dict(zip(names, zip(sizes, checksums, strict=True), strict=True))
        manifest.write_text(json.dumps({"saved": time.time(), "files": entries}, indent=1))
        list(pool.map(_flush, [*paths, manifest, folder, folder.parent]))


def _read_manifest(folder: Path) -> tuple[float, dict[str, tuple[int, int]]]:
    manifest = json.loads((folder / MANIFEST).read_text())
    files = {name: (int(size), int(checksum)) for name, (size, checksum) in manifest["files"].items()}
    return float(manifest["saved"]), files


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, in a few words; None if nothing is."""
    try:
        expected = _read_manifest(folder)[1]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return f"its {MANIFEST} cannot be read"
    try:
        for name, (size, _) in expected.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found} bytes instead of {size}"
        with ThreadPoolExecutor() as pool:
            checksums = pool.map(_checksum, [folder / name for name in expected])
            for (name, (_, checksum)), found in zip(expected.items(), checksums, strict=True):
                if found != checksum:
                    return f"the checksum of {name} is {found} instead of {checksum}"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    return None


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The ``checkpoint-N`` that was saved last and agrees with its manifest; a warning names each newer one.

    By time and not by step: a run that went on from an earlier checkpoint leaves later steps of another run behind.
    Those without a readable manifest are looked at first, from the highest step on.
    """

    def age(item: tuple[int, Path]) -> tuple[float, int]:
        try:
            return _read_manifest(item[1])[0], item[0]
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return math.inf, item[0]

    folders = [path for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    steps = {int(step): path for path in folders if (step := path.name.partition("-")[2]).isdecimal()}
    for _, path in sorted(steps.items(), key=age, reverse=True):
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning("The checkpoint %s is skipped: %s.", path, damage)
    return None


def _set_aside(folder: Path) -> Path:
    """Rename a checkpoint into the trash; returns where it is then."""
    trash = folder.parent / TRASH
    shutil.rmtree(trash, ignore_errors=True)
    trash.mkdir(exist_ok=True)  # files that others hold open can survive on a network file system
    aside = trash / folder.name
    if aside.exists():
        aside = Path(tempfile.mkdtemp(dir=trash)) / folder.name
    os.replace(folder, aside)
    return aside


def discard(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that none is ever seen half deleted."""
    _set_aside(folder)
    shutil.rmtree(folder.parent / TRASH, ignore_errors=True)


def _appear(staged: Path, final: Path) -> None:
    old = _set_aside(final) if final.exists() else None
    try:
        os.replace(staged, final)
    except BaseException:
        if old is not None:
            os.replace(old, final)
        raise
    _flush(final.parent)
    for name in (TRASH, STAGING):
        shutil.rmtree(final.parent / name, ignore_errors=True)


def clear_leftovers(output_dir: str | Path) -> None:
    """Remove what a killed run was saving or deleting; a checkpoint that lacked only its final name gets it."""
    output_dir = Path(output_dir)
    for staged in (output_dir / STAGING).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if find_damage(staged) is None:
            _appear(staged, output_dir / staged.name)
    for name in (STAGING, TRASH):
        shutil.rmtree(output_dir / name, ignore_errors=True)


class ExactResume:
    """Mixin in front of a TRL on-policy trainer: atomic checkpoints, and a resume that continues bit for bit.

    Its hooks are private names of transformers (5.17 to 5.23) and TRL 1.16. A checkpoint gains, for each process, what
    the host keeps in memory only: losses and metrics that are not logged yet, the position in the generation cycle,
    the latest observations of the collapse watch, and whether the epoch that ends with its step has been closed.
    """

    _staging = False
    _pending: str | None = None  # the checkpoint whose progress is still to be restored
    _progress: Mapping[str, Any] = MappingProxyType({})  # what it holds beyond the host's files
    _complete_epochs = 0
    _visited = 0  # the step after which the host last asked what to log, evaluate and save
    _epoch_closed = False
    _last_step: tuple[float | None, float | None] = (None, None)  # its gradient's norm and learning rate, for the log
    _began = 0.0

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """The host's; ``True`` resumes from the newest complete checkpoint, or starts anew where there is none.

        Raises:
            ConfigError: the given checkpoint does not exist or is damaged.
        """
        if self.args.should_save:
            clear_leftovers(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        outcome: list[str | None] = [None, None]
        if self.accelerator.is_main_process and resume_from_checkpoint:
            try:
                outcome[0] = self._choose_checkpoint(resume_from_checkpoint)
            except (ValueError, OSError) as error:  # raised by every process, so that none waits for the others
                outcome[1] = str(error)
        checkpoint, problem = broadcast_object_list(outcome)
        if problem is not None:
            raise ConfigError(problem)
        return super().train(checkpoint, *args, **kwargs)

    def _choose_checkpoint(self, wanted: str | Path | bool) -> str | None:
        if wanted is True:
            newest = newest_complete_checkpoint(self.args.output_dir)
            if newest is not None:
                return str(newest)
            # An error, as from the host, would never let a scheduler begin that always starts the same command.
            logger.warning("%s has no complete checkpoint: training starts from the beginning.", self.args.output_dir)
            return None
        if not Path(wanted).is_dir():
            raise ValueError(f"resume_from_checkpoint must be the folder of a checkpoint, got {str(wanted)!r}.")
        if not (Path(wanted) / MANIFEST).exists():
            logger.warning("The checkpoint %s has no %s: whether it is complete is unknown.", wanted, MANIFEST)
        elif damage := find_damage(Path(wanted)):
            raise ValueError(f"resume_from_checkpoint must be a complete checkpoint, but in {str(wanted)!r} {damage}.")
        return str(wanted)

    # ---- saving

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, STAGING) if self._staging else run_dir

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:  # uploads go on in the background, so only from a folder that keeps its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(self._get_output_dir(trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged = run_dir / STAGING / final.name
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == staged:
                self.state.best_model_checkpoint = str(final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
                write_manifest(staged)
                _appear(staged, final)
        except BaseException:
            shutil.rmtree(staged.parent, ignore_errors=True)
            logger.error("%s could not be saved; earlier checkpoints are as they were.", final)
            raise
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._rotate(final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _rotate(self, newest: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        kept = {newest} if best is None else {newest, Path(best)}
        others = [path for path in map(Path, sort_checkpoints(str(newest.parent), use_mtime=True)) if path not in kept]
        for path in others[: max(len(others) + len(kept) - max(limit, len(kept)), 0)]:
            try:
                discard(path)
            except OSError as error:
                logger.warning("The old checkpoint %s could not be deleted: %s.", path, error)

    def _progress_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"progress_{self.args.process_index}.pt"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        progress = {
            "processes": self.args.world_size,
            "seconds": time.time() - self._began,
            "epoch_closed": self._epoch_closed,
            "loss": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "last_step": self._last_step,
            "passes": self._step,
            "metrics": {mode: dict(values) for mode, values in self._metrics.items()},
            "training": self.model.training,
        }
        torch.save(progress, self._progress_file(output_dir))

    # ---- resuming

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        position = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, checkpoint, trial)
        done = self.state.global_step
        self._pending, self._visited, self._complete_epochs, self._progress = checkpoint, done, position[0], {}
        self._began = time.time()
        if checkpoint is None:
            return position
        self._progress = self._load_progress(checkpoint)
        if self._progress.get("epoch_closed", True) or self.args.ignore_data_skip:
            return (num_train_epochs, 0) if done >= max_steps else position
        if done >= max_steps or position[1] == 0:  # the epoch's steps are all done, but not what follows the last
            return (done - 1) // steps_per_epoch, steps_per_epoch * self.args.gradient_accumulation_steps
        return position

    def _load_progress(self, checkpoint: str) -> Mapping[str, Any]:
        path = self._progress_file(checkpoint)
        progress = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if progress.get("processes") == self.args.world_size:
            return progress
        if self.accelerator.is_main_process:
            message = "%s lacks the progress of %d process(es): training continues, but not exactly."
            logger.warning(message, checkpoint, self.args.world_size)
        return {}

    def _load_callback_state(self) -> None:
        super()._load_callback_state()  # may put other instances in the callbacks' place
        kind = type(self.steering)
        self.steering = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, kind))

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader]:
        # The host's sampler draws the permutation of each epoch from one generator, which a new process starts anew.
        for _ in range(self._complete_epochs):
            next(iter(train_dataloader.batch_sampler))
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # Before anything is restored this can only be ``eval_on_start``, which was done when the run began.
        return {} if self._pending is not None else super()._evaluate(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, learning_rate: float | None = None
    ) -> None:
        # The host asks after every step and, with no further step, at the end of an epoch.
        self._epoch_closed = self._visited == self.state.global_step
        if learning_rate is None:  # resumed after the last step of the epoch
            grad_norm, learning_rate = self._progress.get("last_step", (grad_norm, None))
        self._last_step = None if grad_norm is None else float(grad_norm), learning_rate
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate)
        self._visited = self.state.global_step

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self._restore()
        return super()._finalize_training(trial, num_train_samples, min(start_time, self._began))

    def _restore(self) -> None:
        if self._pending is None:
            return
        checkpoint, self._pending = self._pending, None
        self._load_rng_state(checkpoint)
        self.control.should_training_stop |= self.state.global_step >= self.state.max_steps
        progress = self._progress
        if not progress:
            return
        self._began -= progress["seconds"]
        self._initial_global_step = 0  # like its beginning: final means and rates are those of the whole run
        self._tr_loss = progress["loss"].to(self.args.device)
        self._total_loss_scalar = progress["total_loss"]
        self._globalstep_last_logged = progress["last_logged"]
        self._step = progress["passes"]
        self.model.train(progress["training"])  # by this the host decides whose metrics it logs
        for mode, values in progress["metrics"].items():
            self._metrics[mode].clear()
            self._metrics[mode].update(values)
