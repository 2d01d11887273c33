"""A model, and another one before it, on benchmarks: what has run is read, what has not is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError, config_errors
from . import harness, statistics
from .paper import PAPER_MEANS
from .results import TaskScores, read_scores
from .settings import EvalSettings

SETTINGS = "settings.json"
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")


def modes(repeats: int) -> dict[str, int]:
    """Metric -> responses to each question: Acc@1 is greedy, Acc@k the mean over k samples."""
    return {"Acc@1": 1} if repeats == 1 else {"Acc@1": 1, f"Acc@{repeats}": repeats}


def mode_folder(repeats: int) -> str:
    return "greedy" if repeats == 1 else f"sampled-{repeats}"


def written_down(settings: EvalSettings) -> dict[str, Any]:
    """Settings with what tells whether a model on this machine is still the same: sizes and times of its files."""
    folder = Path(settings.model)
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)}) if folder.is_dir() else []
    stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {"settings": settings.as_json(), "files": stats}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before["settings"], now["settings"]
    found = [f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name]]
    return found or (["the model's files have changed"] if before["files"] != now["files"] else [])


def claim(folder: Path, settings: EvalSettings, overwrite: bool) -> None:
    """Write down what a folder's results were made with, or see that they were made with the same.

    Args:
        folder: of one model's results.
        settings: of this evaluation.
        overwrite: delete results of other settings.

    Raises:
        ConfigError: it holds results of other settings, or cannot be written.
    """
    path, record = folder / SETTINGS, written_down(settings)
    with config_errors(f"{str(folder)!r} cannot hold results", OSError, ValueError, KeyError):
        if overwrite and path.is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if changed := _changes(json.loads(path.read_text()), record):
                raise ConfigError(
                    f"{str(folder)!r} holds results of other settings ({'; '.join(changed)}): name another folder by "
                    "--out, or delete them by --overwrite."
                )
        else:
            if any(folder.iterdir()):
                raise ConfigError(f"{str(folder)!r} must be empty or hold results of vgs eval, got other files.")
            path.write_text(json.dumps(record, indent=1) + "\n")


def run_model(
    folder: Path,
    settings: EvalSettings,
    names: Sequence[str],
    repeats: int,
    python: str | None,
    *,
    batch_size: int = 8,
    gpus: int = 1,
) -> dict[str, dict[str, TaskScores]]:
    """Scores of a model: metric -> benchmark -> scores; benchmarks that have run are not run again.

    Args:
        folder: of its results, claimed.
        settings: as claimed.
        names: of benchmarks. repeats: responses to each question for the sampled metric; 1: greedy alone.
        python: of ``harness.find_python``; None: everything has run.
        batch_size: questions per generation. gpus: that vLLM spreads the model over.

    Raises:
        HarnessError: lmms-eval has failed; what ran before stays.
    """
    found: dict[str, dict[str, TaskScores]] = {}
    for metric, count in modes(repeats).items():
        found[metric] = {}
        for name in names:
            place, written = folder / mode_folder(count) / name, folder / "_running"
            if not (place / "samples.jsonl").is_file():
                line = harness.command(
                    python or "", settings, f"vgs_{name}", written, repeats=count, batch_size=batch_size, gpus=gpus
                )
                harness.run_task(line, written, place, folder / SETTINGS)
            found[metric][name] = read_scores(place, count, settings.max_new_tokens)
    return found


def check_statistics() -> None:
    """Stop before any work where SciPy is missing.

    Raises:
        ConfigError: it is.
    """
    statistics.scipy_stats()


def missing(folder: Path, names: Sequence[str], repeats: int) -> bool:
    """Whether a benchmark still has to run."""
    places = [folder / mode_folder(count) / name for count in modes(repeats).values() for name in names]
    return not all((place / "samples.jsonl").is_file() for place in places)


def _summary(settings: EvalSettings, scores: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, Any]:
    first = next(iter(scores.values()))
    parts = {
        name: {
            metric: {**statistics.accuracy(found[name]), "cut_off": found[name].cut_off}
            for metric, found in scores.items()
        }
        for name in first
    }
    return {"settings": settings.as_json(), "benchmarks": parts, "mean": _means(parts, "accuracy")}


def _means(parts: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """Metric -> mean over benchmarks."""
    metrics = next(iter(parts.values()))
    return {metric: statistics.mean_of([part[metric] for part in parts.values()], name) for metric in metrics}


def summarise(
    settings: EvalSettings,
    scores: Mapping[str, Mapping[str, TaskScores]],
    baseline: EvalSettings | None = None,
    before: Mapping[str, Mapping[str, TaskScores]] | None = None,
) -> dict[str, Any]:
    """Accuracies with intervals and, with a baseline, paired differences with tests.

    Args:
        settings, scores: of the model; of ``run_model``.
        baseline, before: of the other one.

    Returns:
        For JSON: ``model`` and ``baseline`` with ``settings``, ``benchmarks`` and ``mean``; ``difference``; ``paper``.

    Raises:
        ConfigError: the two answered other questions.
    """
    results: dict[str, Any] = {"model": _summary(settings, scores)}
    if baseline is not None and before is not None:
        results["baseline"] = _summary(baseline, before)
        parts: dict[str, dict[str, Any]] = {name: {} for name in next(iter(scores.values()))}
        for metric, found in scores.items():
            for name, own in found.items():
                parts[name][metric] = statistics.difference(own, before[metric][name])
        results["difference"] = {"benchmarks": parts, "mean": _means(parts, "difference")}
    results["paper"] = [
        {"model": size, "method": method, "Acc@1": first, "Acc@16": many} for size, method, first, many in PAPER_MEANS
    ]
    return results
