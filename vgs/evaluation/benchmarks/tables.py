"""Results of an evaluation as tables: plain text for a terminal, Markdown for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .paper import BENCHMARKS, PAPER_MEANS, PAPER_NOTES

Table = Sequence[Sequence[str]]


def percent(part: Mapping[str, Any] | None, name: str = "accuracy") -> str:
    """``46.1 [43.0, 49.2]``: a fraction with its interval, in percent."""
    if part is None:
        return "-"
    sign = "+" if name == "difference" else ""
    value = f"{100 * part[name]:{sign}.2f}"
    if part["low"] is None:
        return value
    return f"{value} [{100 * part['low']:{sign}.1f}, {100 * part['high']:{sign}.1f}]"


def chance(p: float | None) -> str:
    """A p-value."""
    return "-" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def accuracy_table(results: Mapping[str, Any], who: str) -> list[list[str]]:
    """A model's accuracy by benchmark, with its mean.

    Args:
        results: of ``evaluate.summarise``. who: ``model`` or ``baseline``.
    """
    modes = list(results[who]["mean"])
    rows = [["benchmark", "questions", *modes, "cut off"]]
    for name, part in results[who]["benchmarks"].items():
        cut = part[modes[0]].get("cut_off")
        cells = [percent(part[mode]) for mode in modes]
        rows.append([BENCHMARKS[name].title, str(part[modes[0]]["questions"]), *cells, _share(cut)])
    rows.append(["mean", "", *(percent(results[who]["mean"][mode]) for mode in modes), ""])
    return rows


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def difference_table(results: Mapping[str, Any]) -> list[list[str]]:
    """What a model gained over the baseline, in percentage points, with tests."""
    rows = [["benchmark", "metric", "difference", "p (paired t)", "p (McNemar)", "gained", "lost"]]
    for name, part in results["difference"]["benchmarks"].items():
        for mode, found in part.items():
            exact = chance(found["mcnemar_p"]) if "mcnemar_p" in found else "-"
            moved = [str(found.get(key, "-")) for key in ("gained", "lost")]
            cells = [percent(found, "difference"), chance(found["p"]), exact, *moved]
            rows.append([BENCHMARKS[name].title, mode, *cells])
    for mode, found in results["difference"]["mean"].items():
        rows.append(["mean", mode, percent(found, "difference"), chance(found["p"]), "-", "-", "-"])
    return rows


def paper_gains() -> list[list[str]]:
    """What VGS gained over plain distillation in the paper, by benchmark."""
    rows = [["benchmark", "2B", "4B"]]
    return rows + [[x.title, f"{x.gain_2b:+.2f}", f"{x.gain_4b:+.2f}"] for x in BENCHMARKS.values()]


def paper_means() -> list[list[str]]:
    """The paper's means over its seven benchmarks."""
    rows = [["model", "method", "Acc@1", "Acc@16"]]
    for size, method, *both in PAPER_MEANS:
        rows.append([size, method, *("-" if x is None else f"{x:.2f}" for x in both)])
    return rows


def as_text(table: Table) -> str:
    """A table with its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(table: Table) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def report(results: Mapping[str, Any], markdown: bool) -> str:
    """All tables of an evaluation.

    Args:
        results: of ``evaluate.summarise``.
        markdown: for a file, else for a terminal.
    """
    draw, title = (as_markdown, "## {}") if markdown else (as_text, "{}")
    names = {who: results[who]["settings"]["model"] for who in ("model", "baseline") if who in results}
    parts = []
    for who, name in names.items():
        parts += [title.format(f"Accuracy of {name}, %"), draw(accuracy_table(results, who))]
    if "difference" in results:
        parts += [title.format("Difference, percentage points"), draw(difference_table(results))]
    parts += [title.format("The paper: VGS over plain distillation, Acc@1, percentage points"), draw(paper_gains())]
    parts += [title.format("The paper: mean of the seven benchmarks, %"), draw(paper_means())]
    notes = [*PAPER_NOTES, "Brackets: 95 % intervals over questions. The paper has none, nor its evaluation settings."]
    limit = results["model"]["settings"]["limit"]
    if limit is not None:
        notes.insert(0, f"Only the first {limit} questions of each benchmark: a trial.")
    parts.append("\n".join(f"- {note}" if markdown else note for note in notes))
    return "\n\n".join(parts) + "\n"
