"""Result files: where and with what something was measured, and every sample. Written as rows come in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
_PACKAGES = ("torch", "triton", "numpy", "transformers", "trl", "liger_kernel", "unsloth_zoo")
_KEY = ("shape", "tokens", "dtype", "job", "method")
ROOT = Path(__file__).parents[1]


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Hardware, driver, versions and commit (given, or git's)."""
    status = _output("git", "status", "--porcelain", "--untracked-files=no")
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "device": device,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "device_name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return result


class Results:
    """A result file that is whole at any moment: every change replaces it at once."""

    def __init__(self, path: Path | None, environment: dict[str, Any]) -> None:
        self.path, self.environment = path, environment
        self.rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        self.rows += rows
        self.save()

    def save(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"environment": self.environment, "rows": self.rows}, indent=1) + "\n")
        unfinished.replace(self.path)

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            content = json.loads(path.read_text())
            results = cls(path, content["environment"])
            results.rows = content["rows"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result file of this suite: {error!r}") from error
        return results

    def cells(self) -> Iterator[tuple[tuple, dict[str, Row]]]:
        """((shape, tokens, dtype, job), {method: row}) in the order of measurement."""
        cells: dict[tuple, dict[str, Row]] = {}
        for row in self.rows:
            cell = cells.setdefault(tuple(row[name] for name in _KEY[:-1]), {})
            if row["method"] in cell:
                raise ValueError(f"{self.path} holds two rows of {', '.join(str(row[name]) for name in _KEY)}.")
            cell[row["method"]] = row
        yield from cells.items()


def median(row: Row | None) -> float | None:
    """Median seconds, or None where it was not measured to the end."""
    return statistics.median(row["seconds"]) if row and row["status"] == "ok" and row["seconds"] else None


def percentiles(samples: Iterable[float]) -> tuple[float, float]:
    """The 20th and the 80th, interpolated."""
    ordered = torch.tensor(sorted(samples), dtype=torch.float64)
    low, high = torch.quantile(ordered, torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return low, high


def worst_error(row: Row) -> float | None:
    """Largest relative gradient error over the inputs."""
    return max(row["gradient_errors"].values()) if row.get("gradient_errors") else None
