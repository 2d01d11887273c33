"""What the cells of the steering study say together: chosen learning rates, paired intervals, pictures and a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..plots import COLOURS, INK, save

#: Terms that are compared and drawn.
TERMS = ("standard", "visual", "language")
#: Parts of the tokens, by bin of visual dependency, that terms are compared in.
PARTS = {"all": slice(None), "low": slice(0, 5), "high": slice(-2, None)}
#: Accuracy lost against the student before that counts as a collapse.
COLLAPSE = 0.1


def best_rates(trials: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """The learning rate of each student and arm whose validation accuracy at the end was best; of equal ones the lower.

    Args:
        trials: cells of one seed.
    """
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for trial in trials:
        place, found = (trial["student"], trial["arm"]), (trial["validation_end"], -trial["rate"])
        best[place] = max(best.get(place, found), found)
    return {place: -rate for place, (_, rate) in best.items()}


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean of paired differences and the ends of its bootstrap interval over seeds (NaN for a single one).

    Args:
        differences: one per seed.
        level: the interval's confidence.
    """
    from scipy.stats import bootstrap

    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    found = bootstrap(
        (differences,),
        np.mean,
        confidence_level=level,
        n_resamples=10_000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def summarise(before: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every student and arm, over seeds: accuracies, differences from plain distillation, collapses, terms by bin.

    Args:
        before: cells of the students before training.
        runs: cells of all arms and seeds.

    Returns:
        A row for each student and arm: ``answers`` and ``digits`` (means), ``gain`` and ``digits_gain`` (against plain
        distillation, seed by seed: mean, low, high), ``collapsed`` (fraction of runs that ended more than `COLLAPSE`
        below the student before), ``bins`` (for each term its means by bin of visual dependency), ``terms`` (for each
        term and part of the tokens, of `PARTS`, the difference from plain distillation in nats per token: mean, low,
        high).
    """
    start = {cell["student"]: cell for cell in before}
    rows = []
    for student in start:
        own = [run for run in runs if run["student"] == student]
        plain = {run["seed"]: run for run in own if run["arm"] == "plain"}
        for arm in dict.fromkeys(run["arm"] for run in own):
            of_arm = [run for run in own if run["arm"] == arm]
            row: dict[str, Any] = {"student": student, "arm": arm}
            for key, name in (("answers", "gain"), ("digits", "digits_gain")):
                row[key] = statistics.fmean(run["test"][key] for run in of_arm)
                row[name] = paired_interval([run["test"][key] - plain[run["seed"]]["test"][key] for run in of_arm])
            limit = start[student]["test"]["answers"] - COLLAPSE
            row["collapsed"] = statistics.fmean(run["test"]["answers"] < limit for run in of_arm)
            row["bins"] = {
                term: np.mean([run["bins"][term] for run in of_arm], axis=0).tolist() for term in of_arm[0]["bins"]
            }
            row["terms"] = {
                term: {part: paired_interval(_changes(of_arm, plain, term, part)) for part in PARTS} for term in TERMS
            }
            rows.append(row)
    return rows


def _changes(runs: Sequence[Mapping[str, Any]], plain: Mapping[int, Any], term: str, part: str) -> list[float]:
    """What a term has more in part of the tokens than after plain distillation, for each run."""
    pairs = [(run["bins"][term][PARTS[part]], plain[run["seed"]]["bins"][term][PARTS[part]]) for run in runs]
    return [float(np.mean(own) - np.mean(other)) for own, other in pairs]


def draw(out: Path, results: Mapping[str, Any], arms: Sequence[str]) -> None:
    """The phase diagram (gain on plain distillation by gamma and student), and terms by bin of visual dependency.

    Args:
        out: folder that gets ``phase_diagram.png`` and ``bins.png``.
        results: of the study.
        arms: of the phase diagram, plain distillation first.
    """
    rows = {(row["student"], row["arm"]): row for row in results["summary"]}
    students = [cell["student"] for cell in results["before"]]
    figure = Figure(figsize=(9.0, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, key, title in zip(axes, ("gain", "digits_gain"), ("answers right", "digits read"), strict=True):
        for place, (student, colour) in enumerate(zip(students, COLOURS, strict=False)):
            found = np.asarray([rows[student, arm][key] for arm in arms[1:]]) * 100
            at = np.arange(len(found)) + 0.12 * (place - (len(students) - 1) / 2)
            ends = np.abs(found[:, 1:].T - found[:, 0])
            axis.errorbar(at, found[:, 0], yerr=ends, fmt="o", color=colour, capsize=3, label=student, markersize=4)
        axis.axhline(0.0, color=INK, linewidth=0.8)
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, -1.0), max(high, 1.0))  # less than a point is no difference to look at
        axis.set_xticks(range(len(arms) - 1), [arm.replace(", ", ",\n") for arm in arms[1:]], fontsize=8)
        axis.set_title(f"{title}: points above plain distillation", fontsize=10, color=INK)
        axis.grid(alpha=0.25, linewidth=0.6, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(students), frameon=False)
    save(figure, out / "phase_diagram.png")

    figure = Figure(figsize=(3.4 * len(TERMS), 2.6 * len(students) + 0.5), dpi=150, layout="constrained")
    axes = figure.subplots(len(students), len(TERMS), squeeze=False, sharex=True)
    shown = ("before", *(arm for arm in arms if arm in ("plain", "gamma 2", "gamma 2, frozen prior")))
    for line, student, cell in zip(axes, students, results["before"], strict=True):
        bins = {"before": cell["bins"], **{arm: rows[student, arm]["bins"] for arm in shown[1:]}}
        for axis, term in zip(line, TERMS, strict=True):
            for arm, colour in zip(shown, ("#999999", *COLOURS), strict=False):
                axis.plot(np.arange(1, len(bins[arm][term]) + 1), bins[arm][term], color=colour, label=arm)
            axis.set_title(f"{student}: {term}", fontsize=9, color=INK)
            axis.set_yscale("log")
            axis.grid(alpha=0.25, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("bin of visual dependency", fontsize=8)
    figure.suptitle("Terms on held-out questions, nats per token", fontsize=10, color=INK)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown), frameon=False)
    save(figure, out / "bins.png")


def table(results: Mapping[str, Any]) -> str:
    """The summary as text, one row per student and arm."""

    def gain(found: Sequence[float]) -> str:
        mean, low, high = (100 * value for value in found)
        return f"{mean:+.1f}" + ("" if np.isnan(low) else f" ({low:+.1f} to {high:+.1f})")

    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    rates = {(row["student"], row["arm"]): row["rate"] for row in results["rates"]}
    rows = [["student", "arm", "rate", "answers", "digits", "answers - plain", "digits - plain", "collapsed"]]
    for cell in results["before"]:
        student = cell["student"]
        rows.append([student, "before", "", *(percent(cell["test"][key]) for key in ("answers", "digits")), "", "", ""])
        for row in (row for row in results["summary"] if row["student"] == student):
            rate = rates.get((student, row["arm"]), rates.get((student, "gamma 2")))
            cells = [percent(row["answers"]), percent(row["digits"]), gain(row["gain"]), gain(row["digits_gain"])]
            rows.append(["", row["arm"], f"{rate:g}", *cells, percent(row["collapsed"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(entry.ljust(width) for entry, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    angles = []
    for cell in results["before"]:
        found = cell["geometry"]["parameters"]
        shown = [
            "none" if x is None else f"{x:.0f}"
            for x in (found["all"]["angles"]["language-visual"], found["angles"]["language-visual"][-1])
        ]
        angles.append(f"{cell['student']} {shown[0]} ({shown[1]} in the bin of highest visual dependency)")
    settings, teacher = results["settings"], results["before"][0]["teacher"]["answers"]
    note = f"{settings['test_size']} questions about held-out pictures, greedy answers; differences seed by seed, mean "
    note += f"and 95 % bootstrap interval over {len(settings['seeds'])} seeds ({len(settings['part_seeds'])} of "
    note += f"supervised training and of single parts); the teacher answers {percent(teacher)}."
    note += "\nAngle between the gradients of language and visual before training, degrees: " + ", ".join(angles) + "."
    return "\n".join(["", *lines, "", note, f"{results['seconds']:.0f} s in this call"])
