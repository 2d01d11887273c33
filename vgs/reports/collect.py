"""The numbers of a report: everything that its page and its pictures show, as plain JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vgs_kernels import __version__

from .quantities import BINNED, HELD_OUT, MAIN, PHASES, TIMED, quantity
from .runs import RunLog, arms_of, distinguishing
from .samples import collect_samples
from .statistics import interval

KIND, FORM = "vgs report", 1
#: Most points of a curve; of more, neighbours are averaged.
POINTS = 48
#: Phases that ``step_time`` contains.
INSIDE = ("sampling", "teacher", "eta")
Numbers = dict[str, Any]


def collect(runs: Sequence[RunLog]) -> Numbers:
    """The numbers of a report on some runs.

    Args:
        runs: of ``runs.read_runs``, at least one.

    Returns:
        ``arms``, ``summary``, ``curves``, ``bins``, ``geometry``, ``course`` (of its angles), ``samples``, ``cost``,
        ``differences``, ``settings`` and ``versions``; lists are in the order in which they are shown, and ``arm`` is a
        place in ``arms``. A value that a run has not is None.
    """
    arms = arms_of(runs)
    curves, geometry = _curves(arms), _geometry(arms)
    return {
        "kind": KIND,
        "form": FORM,
        "made_by": __version__,
        "arms": _arms(arms),
        "summary": _summary(arms),
        "curves": curves,
        "bins": _bins(arms),
        "geometry": geometry,
        "course": _course(geometry),
        "samples": collect_samples(arms),
        "cost": _cost(arms),
        "differences": _differences(arms),
        "settings": [_settings(arm[0].config) for arm in arms],
        "versions": _versions(arms),
    }


# ---- arms


def _arms(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    names = _names(arms)
    return [
        {
            "name": name,
            "runs": [{"name": run.name, "folder": run.folder.resolve().name, "seed": run.seed} for run in arm],
            "steps": min(_last_step(run) for run in arm) or None,  # None: final values alone
        }
        for name, arm in zip(names, arms, strict=True)
    ]


def _last_step(run: RunLog) -> int:
    return max((max(values) for values in run.series.values() if values), default=0)


def _names(arms: Sequence[Sequence[RunLog]]) -> list[str]:
    """The arm's own name, else what its folders have in common, else the settings that tell it from the others."""
    named = [arm[0].arm or _common_name([run.name for run in arm]) for arm in arms]
    if len(set(named)) == len(named) and all(named):
        return named
    rows = _differences(arms)
    labels = []
    for place, name in enumerate(named):
        parts = [f"{row['setting'].rpartition('.')[2]} {_brief(row['values'][place])}" for row in rows[:3]]
        labels.append(", ".join(parts) or name)
    if len(set(labels)) == len(labels) and all(labels):
        return labels
    return [f"{name or 'arm'} ({place + 1})" for place, name in enumerate(named)]


def _common_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    start = next(
        (names[0][:n] for n in range(len(names[0]), 0, -1) if all(x.startswith(names[0][:n]) for x in names)), ""
    )
    return start.rstrip("0123456789").rstrip("-_. ").removesuffix("seed").rstrip("-_. ")


def _brief(value: Any) -> str:
    return "unset" if value is None else str(value) if len(str(value)) <= 24 else f"{str(value)[:23]}…"


# ---- curves


def _curves(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    keys = {name for arm in arms for run in arm for name in run.series}
    keys = {name for name in keys if not BINNED.fullmatch(name) and not TIMED.fullmatch(name)}
    held_out = sorted(name for name in keys if HELD_OUT.fullmatch(name) and name not in MAIN)
    order = [*held_out, *MAIN]
    shown = sorted(keys, key=lambda name: (order.index(name) if name in order else len(order), name))
    curves = []
    for key in shown:
        series = [found for place, arm in enumerate(arms) if (found := _series(_logged(arm, key), place))]
        if not any(len(entry["steps"]) > 1 for entry in series):
            continue  # one value is no curve: it is in the summary
        meaning = quantity(key)
        main = HELD_OUT.fullmatch(key) is not None or (key in MAIN and any(_varies(entry) for entry in series))
        curves.append({"key": key, **meaning._asdict(), "main": main, "series": series})
    return curves


def _varies(series: Numbers) -> bool:
    return any(max(run) > min(run) for run in series["runs"])


def _logged(arm: Sequence[RunLog], key: str) -> list[dict[int, float]]:
    return [run.series[key] for run in arm if run.series.get(key)]


def _series(logged: Sequence[Mapping[int, float]], place: int) -> Numbers | None:
    """One arm's curve over the steps that all its runs have logged, or None."""
    if not logged:
        return None
    steps = sorted(set.intersection(*(set(values) for values in logged)))
    if not steps:
        return None
    together = -(-len(steps) // POINTS)
    blocks = [steps[first : first + together] for first in range(0, len(steps), together)]
    runs = [[statistics.fmean(values[step] for step in block) for block in blocks] for values in logged]
    spread = [interval(column) for column in zip(*runs, strict=True)]
    return {
        "arm": place,
        "averaged": together,  # so many logged values are one point
        "steps": [block[-1] for block in blocks],
        "mean": [mean for mean, _ in spread],
        "low": [_finite(mean - half) for mean, half in spread],
        "high": [_finite(mean + half) for mean, half in spread],
        "runs": runs,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(values: Sequence[float]) -> Numbers | None:
    if not values:
        return None
    mean, half = interval(values)
    return {"mean": mean, "half": _finite(half), "runs": len(values)}


# ---- summary


def _summary(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    """Last values: rows of (key, title, unit, one cell an arm)."""
    finals = {name for arm in arms for run in arm for name in run.finals}
    logged = {name for arm in arms for run in arm for name in run.series}
    held_out = sorted(name for name in logged if HELD_OUT.fullmatch(name) and name not in MAIN)
    test = sorted(name for name in finals if name.startswith(("test ", "gap ", "to_start ")))
    test.sort(key=lambda name: not name.startswith("test "))
    keys = [*test, *held_out, *(key for key in MAIN if key in logged or key in finals)]
    keys += [key for key in ("seconds_per_step",) if key in finals]
    rows = []
    for key in keys:
        cells = [_spread([value for run in arm if (value := _last(run, key)) is not None]) for arm in arms]
        rows.append({"key": key, **quantity(key)._asdict(), "cells": cells})
    return rows


def _last(run: RunLog, key: str) -> float | None:
    if key in run.finals:
        return run.finals[key]
    values = run.series.get(key)
    return values[max(values)] if values else None


# ---- terms by bin


def _bins(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    """The terms by bin of visual dependency, means over an arm's runs."""
    found = []
    for place, arm in enumerate(arms):
        keys = [match for run in arm for name in run.series if (match := BINNED.fullmatch(name)) and not match[1]]
        for term in [term for term in MAIN if term in {match[2] for match in keys}]:
            count = 1 + max(int(match[3]) for match in keys if match[2] == term)
            logged = [_logged(arm, f"{term}_bin_{number}") for number in range(count)]
            # A batch with fewer tokens than bins has not logged them all.
            common = set.intersection(*(set(values) for runs in logged for values in runs))
            kept = [[{step: values[step] for step in common} for values in runs] for runs in logged]
            curves = [_series(runs, place) for runs in kept]
            if None in curves:
                continue
            entry = {"arm": place, "term": term, **quantity(term)._asdict(), "steps": curves[0]["steps"]}
            found.append({**entry, "values": [curve["mean"] for curve in curves]})
    return found


# ---- geometry


def _geometry(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    """Each measurement of the gradients' angles and norms; of an arm's runs the first that has some."""
    found = []
    for place, arm in enumerate(arms):
        run = next((run for run in arm if run.geometry), None)
        for record in run.geometry if run is not None else ():
            found += geometry_entries(record, place, run.name)
    return found


def geometry_entries(record: Mapping[str, Any], arm: int, run: str) -> Iterator[Numbers]:
    """One measurement, an entry for each space.

    Args:
        record: of the instrument ``geometry``. arm, run: that it belongs to.
    """
    for space in ("parameters", "hidden"):
        if space in record:
            head = {"arm": arm, "run": run, "step": record["step"], "space": space}
            kept = {name: record[name] for name in ("tokens", "samples", "vds")}
            method = record["method"] if space == "parameters" else "exact"
            yield {**head, **kept, "method": method, **record[space]}


def _course(geometry: Sequence[Numbers]) -> list[Numbers]:
    """The angles over the steps, of all tokens and of the bin that depends most on the image; where there are two."""
    groups: dict[tuple[int, str], list[Numbers]] = {}
    for entry in geometry:
        groups.setdefault((entry["arm"], entry["space"]), []).append(entry)
    found = []
    for (arm, space), entries in groups.items():
        pairs = entries[0]["angles"]
        tokens = {
            "all": {pair: [entry["all"]["angles"][pair] for entry in entries] for pair in pairs},
            "highest": {pair: [entry["angles"][pair][-1] for entry in entries] for pair in pairs},
        }
        if len(entries) > 1:
            found.append({"arm": arm, "space": space, "steps": [entry["step"] for entry in entries], **tokens})
    return found


# ---- cost


def _cost(arms: Sequence[Sequence[RunLog]]) -> Numbers | None:
    """Seconds of a step by phase: means over a run's log, then over its seeds."""
    rows = []
    for place, arm in enumerate(arms):
        phases = [found for run in arm if (found := _phases(run))]
        if phases:
            known = {name for found in phases for name in found}
            seconds = {
                name: _spread([found.get(name, 0.0) for found in phases]) if name in known else None for name in PHASES
            }
            rows.append({"arm": place, "seconds": seconds})
    return {"rows": rows} if rows else None


def _phases(run: RunLog) -> dict[str, float]:
    steps = sorted(run.series.get("step_time", ()))
    steps = steps[1:] or steps  # the first one starts things up

    def mean(name: str) -> float:
        """Over all steps; one that did without the phase took no time for it."""
        values = run.series.get(name, {})
        return statistics.fmean(values.get(step, 0.0) for step in steps) if steps else 0.0

    whole = mean("step_time") or run.finals.get("seconds_per_step")
    if whole is None:
        return {}
    found = {name: value for name in PHASES if (value := mean(f"step_time_{name}"))}
    if inside := [found[name] for name in INSIDE if name in found]:
        found["student"] = max(whole - sum(inside), 0.0)
    return {**found, "step": whole + found.get("optimizer", 0.0)}


# ---- settings and versions


def _differences(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    flat = [distinguishing(arm[0].config) for arm in arms]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = [{"setting": name, "values": [settings.get(name) for settings in flat]} for name in names]
    return [row for row in rows if any(value != row["values"][0] for value in row["values"])]


def _settings(config: Mapping[str, Any]) -> list[Numbers]:
    return [{"setting": name, "value": value} for name, value in sorted(distinguishing(config).items())]


def _versions(arms: Sequence[Sequence[RunLog]]) -> list[Numbers]:
    names = list(dict.fromkeys(name for arm in arms for run in arm for name in run.versions))
    rows = []
    for name in names:
        found = [list(dict.fromkeys(str(run.versions.get(name, "unknown")) for run in arm)) for arm in arms]
        rows.append({"name": name, "values": [", ".join(values) for values in found]})
    return rows
