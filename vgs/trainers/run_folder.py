"""The folder of a run: one run at a time, nobody's files lost, and what it was made from written down.

run.json    the resolved config, versions and data that the run began with
run.lock    held while a run lives
instruments samples and gradients that a run has looked at, if it was asked to
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import ConfigError

logger = logging.getLogger(__name__)

RECORD, LOCK, OWNER = "run.json", "run.lock", "run.owner.json"
INSTRUMENTS = "instruments"  # a folder: what the run has measured of itself, beside its log
PACKAGES = ("vgs-kernels", "torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets")
# What a trainer leaves behind: a folder with one of these holds a run or a model.
TRACES = (
    "checkpoint-*",
    RECORD,
    "trainer_state.json",
    "*.safetensors",
    "config.json",
    "adapter_config.json",
    INSTRUMENTS,
)
#: Settings that change neither the numbers of a run nor what it can resume from, by their last name.
HARMLESS = frozenset(
    {
        *("logging_steps", "logging_first_step", "logging_strategy", "report_to", "run_name", "disable_tqdm"),
        *(
            "save_steps",
            "save_strategy",
            "save_total_limit",
            "log_level",
            "log_completions",
            "num_completions_to_print",
        ),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("output_dir", "on_bad_row", "cache"),
        *("log_terms_by_bin", "save_samples", "save_samples_every", "geometry_every"),
    }
)


def versions() -> dict[str, str]:
    """Installed versions of the libraries that a run stands on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def traces(folder: str | Path) -> list[str]:
    """Names in a folder that an earlier run left, sorted; empty for a new one."""
    folder = Path(folder)
    return sorted({path.name for pattern in TRACES for path in folder.glob(pattern)})


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every setting that two nested configs do not share; None: left out."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        names = [*old, *(name for name in new if name not in old)]
        parts = [differences(old.get(n), new.get(n), f"{where}.{n}" if where else str(n)) for n in names]
        return [item for part in parts for item in part]
    return [] if old == new else [(where, old, new)]


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


class RunFolder:
    """An ``output_dir``.

    Args:
        path: the folder; made by ``claim``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def check_unused(self, wanted: bool = False) -> None:
        """Stop at a folder that an earlier run has used, without touching it.

        Args:
            wanted: the folder is to be used all the same.

        Raises:
            ConfigError: it holds an earlier run, and that is not wanted.
        """
        left = traces(self.path)
        if left and not wanted:
            shown = ", ".join(left[:4]) + (", ..." if len(left) > 4 else "")
            raise ConfigError(
                f"output_dir {str(self.path)!r} holds an earlier run ({shown}); expected a new or empty folder. Go "
                "on with that run by --resume, replace it by --overwrite, or name another folder."
            )

    @contextmanager
    def claim(
        self,
        config: Mapping[str, Any],
        data: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        allow_changes: bool = False,
    ) -> Iterator[None]:
        """Hold the folder for one run, and write down what the run is made from.

        Of several processes only the one of rank 0 must call it.

        Args:
            config: the resolved config, nested.
            data: fingerprints of the datasets.
            resume: go on with the run that is in the folder, if there is one.
            overwrite: delete the checkpoints and the model that an earlier run left here.
            allow_changes: resume although settings or data differ.

        Raises:
            ConfigError: the folder cannot be written to, another run lives in it, it holds an earlier run and neither
                ``resume`` nor ``overwrite`` is given, or a resumed run would be another than the one that was begun.
        """
        lock = self._lock()
        try:
            left = traces(self.path)
            if left and overwrite and not resume:
                self._clear()
            self.check_unused(resume or overwrite)
            record = {"config": _plain(config), "data": _plain(data or {})}
            before = self._before() if left and resume else None
            if before is not None:
                _compare(before, record, self.path, allow_changes)
            self._write(record, before)
            try:
                yield
            except BaseException:
                if not left and traces(self.path) == [RECORD]:  # it has failed before it left anything
                    (self.path / RECORD).unlink()
                raise
        finally:
            (self.path / OWNER).unlink(missing_ok=True)
            lock.release()

    def _lock(self) -> FileLock:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(
                f"output_dir {str(self.path)!r} is in use by another run{self._owner()}; wait for it or name another "
                "folder."
            ) from None
        except OSError as error:
            raise ConfigError(
                f"output_dir must be a folder that can be written to, got {str(self.path)!r} "
                f"({error.strerror or error})."
            ) from error
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        (self.path / OWNER).write_text(json.dumps(owner))
        return lock

    def _owner(self) -> str:
        try:
            owner = json.loads((self.path / OWNER).read_text())
            return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
        except (OSError, ValueError, KeyError):
            return ""

    def _clear(self) -> None:
        """Delete what ``traces`` finds, and nothing else."""
        for name in traces(self.path):
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _before(self) -> dict[str, Any] | None:
        """What the run in the folder began with; None if that was not written down."""
        try:
            return json.loads((self.path / RECORD).read_text())
        except FileNotFoundError:
            return None  # begun by a library call, or by an earlier version
        except ValueError as error:
            raise ConfigError(
                f"{self.path / RECORD} must hold what the run began with, but cannot be read ({error})."
            ) from error

    def _write(self, record: Mapping[str, Any], before: Mapping[str, Any] | None) -> None:
        history = [] if before is None else before.get("history", [])
        if before is not None and any(before.get(part) != record[part] for part in record):
            history = [*history, {key: value for key, value in before.items() if key != "history"}]
        began = time.time() if before is None else before.get("began")
        entry = {**record, "versions": versions(), "began": began, "history": history}
        staged = self.path / f"{RECORD}.new"
        staged.write_text(json.dumps(entry, indent=1) + "\n")
        os.replace(staged, self.path / RECORD)


def _compare(before: Mapping[str, Any], record: Mapping[str, Any], folder: Path, allowed: bool) -> None:
    """Name what differs between a run and what would resume it, and refuse it unless it is allowed."""
    changes = [
        item
        for part, prefix in (("config", ""), ("data", "data fingerprint"))
        for item in differences(before.get(part, {}), record[part], prefix)
        if item[0].rpartition(".")[2] not in HARMLESS
    ]
    if changes and not allowed:
        raise ConfigError(
            f"--resume would go on with another run than the one in {str(folder)!r}: {_listed(changes)}. Take the old "
            "values, or allow the new ones by --allow-changes."
        )
    if changes:
        logger.warning("The run goes on with other settings: %s.", _listed(changes))


def _listed(changes: Sequence[tuple[str, Any, Any]], most: int = 8) -> str:
    parts = [f"{name} was {old!r}, now {new!r}" for name, old, new in changes[:most]]
    return "; ".join(parts) + (f"; and {len(changes) - most} more" if len(changes) > most else "")
