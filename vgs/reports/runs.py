"""What a run has left in its folder: settings, versions, the log, and what its instruments have seen.

Two kinds of folders are read: of `vgs train` (``run.json``, ``trainer_state.json``, ``instruments/``), and of
`vgs demo` or `vgs study` (``results.json``), which hold several runs. Those that were not logged have final
values alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..trainers.run_folder import HARMLESS, INSTRUMENTS, RECORD

STATE, RESULTS = "trainer_state.json", "results.json"
#: What marks a file of the instruments: its kind, and the form that this version reads.
FORMS = {"samples": 1, "geometry": 1}
#: Keys of a log entry that are no curve.
PLACES = ("step", "epoch")

Series = dict[str, dict[int, float]]  # name -> step -> value


@dataclass
class RunLog:
    """One run of one seed.

    Attributes:
        folder: where it was read. name: of the run. arm: as its folder names it; None where settings tell the arms
            apart.
        seed: None if it is not known.
        config: nested settings. versions: of the libraries.
        series: what was logged. finals: numbers that a run has once.
        samples, geometry: what the instruments wrote, in the order of the steps.
    """

    folder: Path
    name: str
    arm: str | None = None
    seed: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    finals: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    geometry: list[dict[str, Any]] = field(default_factory=list)


def read_runs(folders: Sequence[str | Path]) -> list[RunLog]:
    """All runs of some folders, in their order.

    Args:
        folders: each of one run, or of a demo or study.

    Raises:
        ConfigError: a folder that is no run, has no log, or is given twice, or a file that cannot be read.
    """
    found: list[RunLog] = []
    seen: set[Path] = set()
    for folder in map(Path, folders):
        if folder.resolve() in seen:
            raise ConfigError(f"RUN {str(folder)!r} is given twice; expected different folders.")
        seen.add(folder.resolve())
        if not folder.is_dir():
            raise ConfigError(f"RUN must be the folder of a run, got {str(folder)!r}, which is no folder.")
        if (folder / RESULTS).is_file():
            found += _of_results(folder)
        elif (folder / RECORD).is_file() or _states(folder):
            found.append(_of_training(folder))
        else:
            raise ConfigError(
                f"RUN must be the folder of a run, got {str(folder)!r}, which has neither {RECORD} and {STATE} (`vgs "
                f"train`) nor {RESULTS} (`vgs demo`, `vgs study`)."
            )
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must hold JSON, but cannot be read ({error}).") from error


def _section(value: Any, path: Path, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path} must have {what} as a JSON object, got {type(value).__name__}.")
    return value


# ---- `vgs train`


def _states(folder: Path) -> list[Path]:
    return [path for path in (folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")) if path.is_file()]


def _of_training(folder: Path) -> RunLog:
    record = _section(_read(folder / RECORD), folder / RECORD, "the run") if (folder / RECORD).is_file() else {}
    states = [(_section(_read(path), path, "a trainer's state"), path) for path in _states(folder)]
    if not states:
        raise ConfigError(
            f"RUN {str(folder)!r} has no log: expected {STATE} in it or in a checkpoint. `vgs train` writes one at the "
            "end of a run and with every checkpoint."
        )
    state, path = max(states, key=lambda entry: entry[0].get("global_step", 0))
    history = state.get("log_history")
    if not isinstance(history, list) or not history:
        raise ConfigError(f"{path} must have a list log_history with entries, got {history!r:.60}.")
    config = record.get("config") or {}
    run = RunLog(folder, folder.resolve().name, config=config, versions=record.get("versions") or {})
    run.seed = (config.get("training") or {}).get("seed", 42 if config else None)  # the host's default
    for entry in history:
        entry = _section(entry, path, "every entry of log_history")
        for name, value in entry.items():
            if name in PLACES or not _is_number(value):
                continue
            if name.startswith(("train_", "total_")):
                run.finals[name] = float(value)
            else:
                run.series.setdefault(name, {})[int(entry.get("step", 0))] = float(value)
    run.samples = list(_instrument(folder, "samples"))
    run.geometry = list(_instrument(folder, "geometry"))
    return run


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _instrument(folder: Path, kind: str) -> Iterator[dict[str, Any]]:
    """What one instrument has written, in the order of the steps."""
    read = [(_read(path), path) for path in sorted((folder / INSTRUMENTS).glob(f"{kind}-*.json"))]
    for content, path in read:
        content = _section(content, path, "an instrument's record")
        if (content.get("kind"), content.get("form")) != (kind, FORMS[kind]):
            raise ConfigError(
                f"{path} must be of kind {kind!r} in form {FORMS[kind]}, got kind {content.get('kind')!r} in form "
                f"{content.get('form')!r}: another version wrote it."
            )
    yield from sorted((content for content, _ in read), key=lambda content: content["step"])


# ---- `vgs demo`, `vgs study`


def _of_results(folder: Path) -> Iterator[RunLog]:
    path = folder / RESULTS
    results = _section(_read(path), path, "results")
    runs = results.get("runs")
    if not isinstance(runs, list) or not runs or not all(map(_is_entry, runs)):
        raise ConfigError(
            f"{path} must have runs with an arm and curves or a test, as `vgs demo` and `vgs study` write them; this "
            "file has other results."
        )
    settings = _section(results.get("settings", {}), path, "settings")
    arms = _section(settings.get("arms", {}), path, "settings.arms")
    common = {name: value for name, value in settings.items() if name not in ("arms", "seeds", "recipes")}
    shown: set[str] = set()
    for entry in runs:
        of, seed = str(entry["arm"]), entry.get("seed")
        own = {name: entry[name] for name in ("student", "rate") if name in entry}
        arm = f"{own['student']}, {of}" if "student" in own else of
        before = _before(results.get("before") or {}, own.get("student"))
        run = RunLog(folder, f"{arm}, seed {seed}", arm, seed, versions=results.get("versions") or {})
        run.config = {**common, **own, "arm": arms.get(of, {})}
        run.series, run.finals = _series(entry, before, path), _finals(entry)
        if results.get("questions") and arm not in shown and "curves" in entry:
            shown.add(arm)
            run.samples = [
                _answers(results["questions"], spoken, step)
                for spoken, step in ((before, 0), (entry, max(entry["curves"]["step"])))
            ]
        yield run


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, Mapping) and "arm" in entry and ("curves" in entry or "test" in entry)


def _before(before: Any, student: str | None) -> Mapping[str, Any]:
    """What was measured before the runs: one student's, or of the one whose runs these are."""
    if isinstance(before, Mapping):
        return before
    return next((cell for cell in before if cell.get("student") == student), {})


def _series(entry: Mapping[str, Any], before: Mapping[str, Any], path: Path) -> Series:
    """The curves of a run; of one that was not logged, none."""
    if "curves" not in entry:
        return {}
    curves = dict(_section(entry["curves"], path, "curves"))
    steps = curves.pop("step")
    found = {name: _numbers(steps, values) for name, values in curves.items()}
    checks = entry.get("validation") or {"step": [], "accuracy": []}
    start = before.get("validation", before.get("validation_end"))
    found["eval_accuracy"] = _numbers([0, *checks["step"]], [start, *checks["accuracy"]])
    return found


def _numbers(steps: Sequence[int], values: Sequence[Any]) -> dict[int, float]:
    return {step: value for step, value in zip(steps, values, strict=True) if _is_number(value)}


def _finals(entry: Mapping[str, Any]) -> dict[str, float]:
    """What a run was found to be at its end."""
    found = {name: entry.get(name) for name in ("eta", "seconds_per_step")}
    found["eval_accuracy"] = entry.get("validation_end")
    for kind in ("test", "gap", "to_start"):
        flat = flat_settings(entry.get(kind) or {})
        found |= {f"{kind} {name.replace('.', ' ')}": value for name, value in flat.items()}
    return {name: value for name, value in found.items() if _is_number(value)}


def _answers(questions: Sequence[Mapping[str, Any]], spoken: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The demo's answers in the form of the instrument ``samples``."""
    samples = [
        {
            **question,
            "tokens": answer["words"][: len(answer["vds"])],
            "terms": {"vds": answer["vds"]},
            "right": answer["right"],
        }
        for question, answer in zip(questions, spoken.get("answers", ()), strict=False)
    ]
    return {"step": step, "samples": samples}


# ---- arms

#: Settings in which runs of one arm may differ beside ``HARMLESS`` ones, by their last name.
SEEDS = re.compile(r"(.*_)?seed")


def flat_settings(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        dotted = f"{where}.{name}" if where else str(name)
        found |= flat_settings(value, dotted) if isinstance(value, Mapping) and value else {dotted: value}
    return found


def distinguishing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run that are neither seeds nor without influence on its numbers."""
    settings = flat_settings(config)
    return {
        name: value
        for name, value in settings.items()
        if (last := name.rpartition(".")[2]) not in HARMLESS and not SEEDS.fullmatch(last)
    }


def arms_of(runs: Sequence[RunLog]) -> list[list[RunLog]]:
    """Runs that differ in their seed alone, together; in the order of the first of each.

    Args:
        runs: of ``read_runs``.
    """
    arms: dict[str, list[RunLog]] = {}
    for run in runs:
        # Without settings nobody knows what a run was: it is an arm of its own.
        alone = "" if run.config else str(run.folder)
        key = json.dumps([run.arm, distinguishing(run.config), alone], sort_keys=True, default=str)
        arms.setdefault(key, []).append(run)
    return list(arms.values())
