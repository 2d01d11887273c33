"""The charts of a report as PNG files, from the same numbers as the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from textwrap import fill
from typing import Any

from .charts import Chart, Line, all_charts, bands, extent, geometry_charts, points
from .collect import geometry_entries
from .quantities import PHASES
from .svg import RIGHT_ANGLE

#: What marks a picture as this command's own.
SOFTWARE = "vgs report"
HUES = ("#2563a8", "#c24a16", "#17775a", "#7a45ab", "#8a6200", "#b0356a", "#0c7686", "#59616f")
STYLES: tuple[Any, ...] = ("-", (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)), (0, (4, 2)), (0, (12, 3)), ":", "-.")
INK, FAINT = "#1e2430", "#5b6473"
#: Sections that are one picture each.
PICTURES = {
    "curves": "Learning curves: mean over seeds, 95 % t-interval",
    "bins": "Terms by visual dependency",
    "geometry": "Geometry of the gradients",
}


def pictures(numbers: Mapping[str, Any]) -> dict[str, bytes]:
    """File name -> PNG, of every section that has charts.

    Args:
        numbers: of ``collect.collect``.
    """
    charts = all_charts(numbers)
    with _plain_text():
        found = {f"{name}.png": _panels(numbers, charts[name], text) for name, text in PICTURES.items() if charts[name]}
        if numbers["cost"] is not None:
            found["cost.png"] = _cost(numbers)
    return found


def geometry_picture(record: Mapping[str, Any], title: str) -> bytes:
    """The angles and norms of one measurement as a PNG.

    Args:
        record: of ``vgs geometry``. title: of the picture.
    """
    numbers = {"arms": [{"name": title}], "geometry": list(geometry_entries(record, 0, title))}
    with _plain_text():
        return _panels(numbers, geometry_charts(numbers), title)


def _plain_text() -> AbstractContextManager[None]:
    """Names are shown as they are: a ``$`` in one is no formula."""
    from matplotlib import rc_context

    return rc_context({"text.parse_math": False})


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": SOFTWARE})
    return out.getvalue()


def _colour(line: Line) -> Any:
    if line.shade is None:
        return HUES[(line.arm if line.arm is not None else line.hue or 0) % len(HUES)]
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("bins", ["#b4c5dc", "#12305c"])(line.shade)


def _panels(numbers: Mapping[str, Any], charts: Sequence[Chart], title: str) -> bytes:
    columns = 2 if len(charts) == 4 else min(3, len(charts))
    rows = -(-len(charts) // columns)
    figure = _figure(4.0 * columns, 2.9 * rows + 0.7)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    labels: dict[tuple[str, Any], Any] = {}
    for axis, chart in zip(axes.flat, charts, strict=False):
        for line in chart.lines:
            labels.setdefault((line.label, _colour(line)), _draw(axis, numbers, line))
        left, right, bottom, top = extent(numbers, chart)
        margin = 0.02 * (right - left)
        axis.set(xlim=(left - margin, right + margin), ylim=(bottom, top))
        note = fill(chart.note, 62)
        axis.set_title(chart.title, fontsize=10, color=INK, pad=7 + 10 * len(note.splitlines()))
        axis.annotate(note, (0.5, 1), (0, 4), "axes fraction", "offset points", ha="center", fontsize=7.5, color=FAINT)
        axis.set_xlabel(chart.x_label, fontsize=8.5, color=FAINT)
        axis.xaxis.get_major_locator().set_params(integer=True)  # bins and steps
        axis.tick_params(labelsize=8, colors=FAINT)
        if chart.unit == "share":
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
        if chart.unit == "degrees" and bottom < RIGHT_ANGLE < top:
            axis.axhline(RIGHT_ANGLE, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11, color=INK)
    names = [label for label, _ in labels]
    figure.legend(
        list(labels.values()), names, loc="outside lower center", ncols=min(len(names), 5), frameon=False, fontsize=8.5
    )
    return _png(figure)


def _draw(axis: Any, numbers: Mapping[str, Any], line: Line) -> Any:
    colour, found, rows = _colour(line), points(numbers, line), bands(numbers, line)
    xs, ys = [x for x, _ in found], [y for _, y in found]
    if rows and line.error is None:
        where, low, high = zip(*rows, strict=True)
        axis.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)
    elif rows:
        where, low, high = zip(*rows, strict=True)
        axis.vlines(where, low, high, color=colour, alpha=0.7, linewidth=1.4)
    for run in line.runs:
        single = points(numbers, replace(line, y=run))
        axis.plot([x for x, _ in single], [y for _, y in single], color=colour, linewidth=0.6, alpha=0.45)
    style = (
        "-" if line.shade is not None else STYLES[(line.arm if line.arm is not None else line.hue or 0) % len(STYLES)]
    )
    (drawn,) = axis.plot(xs, ys, color=colour, linestyle=style, linewidth=1.5, marker="o" if line.dots else None, ms=3)
    return drawn


def _cost(numbers: Mapping[str, Any]) -> bytes:
    rows = numbers["cost"]["rows"]
    named = [name for name in PHASES if any(row["seconds"][name] for row in rows) and name != "step"] or ["step"]
    figure = _figure(8.0, 1.4 + 0.5 * len(rows))
    axis = figure.subplots()
    for place, row in enumerate(rows):
        start = 0.0
        for number, name in enumerate(named):
            width = row["seconds"][name]["mean"] if row["seconds"][name] else 0.0
            label = PHASES[name] if place == 0 else None
            axis.barh(place, width, left=start, color=HUES[number % len(HUES)], label=label, height=0.6)
            start += width
    axis.set_yticks(range(len(rows)), [numbers["arms"][row["arm"]]["name"] for row in rows], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("seconds per step", fontsize=9, color=FAINT)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    return _png(figure)
