"""Result files as pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from .jobs import JOBS
from .methods import FLOOR, METHODS
from .report import describe, title
from .results import Results, Row, median, percentiles

#: One colour for each method in all pictures; the floor is grey.
_COLOURS = {FLOOR: "0.45", **dict(zip(METHODS, [*(f"C{i}" for i in range(10)), "black", "gold"], strict=True))}
_MARKERS = dict(zip(JOBS, "osD^vP<X", strict=True))
_INPUTS = {"student": "hidden states", "student_text": "text-only hidden states", "student_weight": "head"}


def _series(results: Results) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """{(shape, job): {method: rows by increasing N}} where there are at least two N."""
    series: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in sorted(results.rows, key=lambda row: row["tokens"]):
        series.setdefault((row["shape"], row["job"]), {}).setdefault(row["method"], []).append(row)
    return {key: methods for key, methods in series.items() if len(methods[FLOOR]) > 1}


def _headline(results: Results) -> dict[str, dict[str, Row]]:
    """{job: {method: row}} of the first size in the file."""
    first = results.rows[0]
    return {
        job: rows
        for (shape, tokens, _, job), rows in results.cells()
        if (shape, tokens) == (first["shape"], first["tokens"])
    }


def _panels(count: int, width: float, height: float, caption: str) -> tuple[Figure, list[Axes]]:
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    figure.suptitle(textwrap.fill(caption, int(15 * width * columns)), fontsize=8)
    return figure, list(axes.flat[:count])


def _readable(axis: Axes, name: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5."""
    target = getattr(axis, f"{name}axis")
    getattr(axis, f"set_{name}scale")("log")
    target.set_major_locator(LogLocator(subs=(1, 2, 5)))
    target.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


def _over_tokens(
    results: Results,
    value: Callable[[Row], float | None],
    label: str,
    band: Callable[[Row], tuple[float, float]] | None = None,
    reference: tuple[str, Callable[[Row], float]] | None = None,
) -> Figure | None:
    """A panel for each job that was measured at several N, a line for each method."""
    series = _series(results)
    if not series:
        return None
    figure, axes = _panels(len(series), 6, 4.4, describe(results.environment))
    for axis, ((shape, job), methods) in zip(axes, series.items(), strict=True):
        for method, rows in methods.items():
            rows = [row for row in rows if value(row) is not None]
            if not rows:
                continue
            tokens, colour = [row["tokens"] for row in rows], _COLOURS[method]
            axis.plot(
                tokens, [value(row) for row in rows], color=colour, marker="o", ms=4, label=title(method),
                ls="--" if method == FLOOR else "-", lw=2.8 if method == "ours" else 1.4,
            )  # fmt: skip
            if band is not None:
                axis.fill_between(tokens, *zip(*map(band, rows), strict=True), color=colour, alpha=0.2, lw=0)
        rows = methods[FLOOR]
        tokens = [row["tokens"] for row in rows]
        if reference is not None:
            axis.plot(tokens, [reference[1](row) for row in rows], color="0.45", ls=":", label=reference[0])
        axis.set(xscale="log", xlabel="tokens N", ylabel=label, title=f"{JOBS[job].title} ({shape})")
        axis.set_xticks(tokens, [f"{n:,}" for n in tokens])
        _readable(axis, "y")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def time_over_tokens(results: Results) -> Figure | None:
    return _over_tokens(results, median, "seconds, forward + backward", band=lambda row: percentiles(row["seconds"]))


def memory_over_tokens(results: Results) -> Figure | None:
    def gib(n_bytes: float | None) -> float | None:
        return None if n_bytes is None else n_bytes / 2**30

    reference = ("the gradients themselves", lambda row: gib(row["gradient_bytes"]))
    return _over_tokens(
        results, lambda row: gib(row["peak_extra_bytes"]), "peak extra memory, GiB", reference=reference
    )


def _size(row: Row) -> str:
    return f"{row['shape']}, N {row['tokens']:,}, V {row['vocab']:,}, Ds {row['student']:,}, Dt {row['teacher']:,}"


def floor_ratio(results: Results) -> Figure:
    """Floor / time at the first size, a panel for each job."""
    jobs = _headline(results)
    caption = f"{_size(results.rows[0])}; {describe(results.environment)}"
    figure, axes = _panels(len(jobs), 5.5, 2.6, caption)
    for axis, (job, rows) in zip(axes, jobs.items(), strict=True):
        floor = median(rows[FLOOR]) or float("nan")
        shown = [name for name in reversed(rows) if name != FLOOR and median(rows[name])]
        ratios = [floor / median(rows[name]) for name in shown]
        bars = axis.barh([title(name) for name in shown], ratios, color=[_COLOURS[name] for name in shown])
        axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axis.axvline(1, color="0.45", ls="--")
        axis.set(xlim=(0, 1.15 * max(1, *ratios)), title=JOBS[job].title, xlabel="floor / time (1 = bare products)")
        axis.tick_params(labelsize=8)
    return figure


def gradient_error(results: Results) -> Figure | None:
    """Relative gradient error against float64 at the first size, a panel for each job; None of first calls."""
    jobs = _headline(results)
    if not any(row["gradient_errors"] for rows in jobs.values() for row in rows.values()):
        return None
    caption = f"{_size(results.rows[0])}; {describe(results.environment)}"
    figure, axes = _panels(len(jobs), 5.5, 2.8, caption)
    for axis, (job, rows) in zip(axes, jobs.items(), strict=True):
        shown = [name for name in reversed(rows) if rows[name]["gradient_errors"]]
        names = [name for name in _INPUTS if name in JOBS[job].trainable]
        for name in names:
            errors = [100 * rows[method]["gradient_errors"][name] for method in shown]
            label = _INPUTS[name].replace("hidden states", "logits") if JOBS[job].dense else _INPUTS[name]
            axis.plot(errors, range(len(shown)), "osD"[names.index(name)], label=label, ms=7, alpha=0.8)
        axis.set_yticks(range(len(shown)), [title(name) for name in shown], fontsize=8)
        axis.set(ylim=(-0.6, len(shown) - 0.4), title=JOBS[job].title, xlabel="gradient error against float64, %")
        _readable(axis, "x")
        axis.tick_params(axis="x", labelsize=7)
        axis.margins(x=0.15)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return figure


def roofline(results: Results) -> Figure:
    """Necessary FLOPs per second over necessary FLOPs per byte, under the ceilings measured in the same run."""
    ceilings = results.environment["ceilings"]
    figure, (axis,) = _panels(1, 9, 5, describe(results.environment))
    rows = [row for row in results.rows if median(row) and row["floor_flops"]]
    intensity = np.array([row["floor_flops"] / row["compulsory_bytes"] for row in rows])
    x = np.geomspace(
        min(intensity.min() / 4, ceilings["flops"] / ceilings["bytes_per_second"] / 4), intensity.max() * 2
    )
    roof = np.minimum(ceilings["flops"], x * ceilings["bytes_per_second"])
    axis.plot(x, roof / 1e12, color="black", label="ceilings: a large product, a large copy")
    for row, position in zip(rows, intensity, strict=True):
        axis.plot(
            position,
            row["floor_flops"] / median(row) / 1e12,
            _MARKERS[row["job"]],
            color=_COLOURS[row["method"]],
            ms=6,
            alpha=0.8,
        )
    for method in dict.fromkeys(row["method"] for row in rows):
        axis.plot([], [], "s", color=_COLOURS[method], label=title(method))
    for job in dict.fromkeys(row["job"] for row in rows):
        axis.plot([], [], _MARKERS[job], color="white", mec="black", label=JOBS[job].title)
    axis.set(xlabel="FLOP per byte that the job cannot avoid", title="Roofline")
    axis.set_ylabel("TFLOP/s of the products that the job cannot avoid")
    _readable(axis, "x")
    _readable(axis, "y")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def stacked_phases(cells: dict[str, dict[str, dict[str, float]]], label: str, caption: str) -> Figure:
    """A bar for each method, stacked by phase; a panel for each cell ({cell: {method: {phase: value}}})."""
    figure, axes = _panels(len(cells), 7.5, 3, caption)
    for axis, (cell, methods) in zip(axes, cells.items(), strict=True):
        shown = list(reversed(methods))
        left = np.zeros(len(shown))
        for index, phase in enumerate(dict.fromkeys(phase for phases in methods.values() for phase in phases)):
            values = np.array([methods[method].get(phase, 0.0) for method in shown])
            axis.barh(shown, values, left=left, color=f"C{index}", label=phase)
            left += values
        axis.bar_label(
            axis.containers[-1],
            labels=[f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in left],
            padding=3,
            fontsize=8,
        )
        axis.set(title=cell, xlabel=label, xlim=(0, 1.2 * left.max()))
        axis.tick_params(labelsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    return figure


FIGURES = {
    "time": time_over_tokens,
    "memory": memory_over_tokens,
    "floor": floor_ratio,
    "error": gradient_error,
    "roofline": roofline,
}


def save_all(results: Results, folder: Path) -> list[Path]:
    """Write every picture that the results allow as ``folder/<name>.png``.

    Raises:
        ValueError: without any row.
    """
    if not results.rows:
        raise ValueError(f"{results.path} holds no row to draw.")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130)
            plt.close(figure)
    return paths
