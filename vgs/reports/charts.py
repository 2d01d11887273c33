"""The charts of a report, as places in its numbers: the page and the pictures draw the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

#: Pairs of gradients whose angle is shown.
SPACES = {"parameters": "parameters", "hidden": "last hidden states"}
PAIRS = ("language-visual", "standard-visual", "standard-language")


@dataclass(frozen=True)
class Line:
    """One curve: where its numbers stand, as dotted ways into the report.

    Attributes:
        label: of the curve. x, y: places of lists of equal length.
        low, high: of a band around it; values there may be None. error: half the width of an error bar.
        runs: of the single runs that it is the mean of.
        arm: whose colour it has; None: it has ``shade``.
        shade: 0 to 1, of a scale from low to high visual dependency.
        hue: a number of its own, where neither arm nor shade tells the lines apart.
        dots: mark the points.
    """

    label: str
    x: str
    y: str
    low: str | None = None
    high: str | None = None
    error: str | None = None
    arm: int | None = None
    runs: tuple[str, ...] = ()
    shade: float | None = None
    hue: int | None = None
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
        name: a word for its file and its anchor. title, note: what it shows. unit: see ``Quantity``.
        x_label: of the horizontal axis. lines: its curves.
        beside: curves of charts that it is compared with: they set its scale too.
    """

    name: str
    title: str
    note: str
    unit: str
    x_label: str
    lines: tuple[Line, ...] = field(default_factory=tuple)
    beside: tuple[Line, ...] = field(default_factory=tuple)


def look_up(numbers: Any, place: str) -> Any:
    """What stands at a dotted place of a report, such as ``"curves.0.series.1.mean"``."""
    for part in place.split("."):
        numbers = numbers[int(part)] if isinstance(numbers, Sequence) else numbers[part]
    return numbers


def curve_charts(numbers: Mapping[str, Any], main: bool) -> list[Chart]:
    """One chart for each logged value: arms as lines, with intervals over seeds."""
    charts = []
    for place, curve in enumerate(numbers["curves"]):
        if curve["main"] != main:
            continue
        lines = []
        for row, series in enumerate(curve["series"]):
            at = f"curves.{place}.series.{row}"
            name = numbers["arms"][series["arm"]]["name"]
            few = len(series["steps"]) <= 12
            band = (f"{at}.low", f"{at}.high")
            runs = tuple(f"{at}.runs.{n}" for n in range(len(series["runs"])) if len(series["runs"]) > 1)
            lines.append(Line(name, f"{at}.steps", f"{at}.mean", *band, arm=series["arm"], runs=runs, dots=few))
        name = "".join(letter if letter.isalnum() else "-" for letter in curve["key"])
        charts.append(Chart(f"curve-{name}", curve["title"], curve["meaning"], curve["unit"], "step", tuple(lines)))
    return charts


def bin_charts(numbers: Mapping[str, Any]) -> list[Chart]:
    """One chart for each arm and term: a line for each bin of visual dependency."""
    charts = []
    for place, entry in enumerate(numbers["bins"]):
        count = len(entry["values"])
        lines = [
            Line(
                _bin_label(number, count),
                f"bins.{place}.steps",
                f"bins.{place}.values.{number}",
                shade=number / max(count - 1, 1),
            )
            for number in range(count)
        ]
        arm = numbers["arms"][entry["arm"]]["name"]
        title = f"{entry['title']} — {arm}" if len(numbers["arms"]) > 1 else entry["title"]
        name = f"bins-{entry['arm']}-{entry['term']}"
        charts.append(Chart(name, title, entry["meaning"], entry["unit"], "step", tuple(lines)))
    terms = [entry["term"] for entry in numbers["bins"]]
    return _comparable(charts, terms)


def _comparable(charts: Sequence[Chart], kinds: Sequence[Any]) -> list[Chart]:
    """Charts of one kind after each other, on one scale."""
    groups: dict[Any, list[Chart]] = {}
    for chart, kind in zip(charts, kinds, strict=True):
        groups.setdefault(kind, []).append(chart)
    return [
        replace(chart, beside=tuple(line for other in group if other is not chart for line in other.lines))
        for group in groups.values()
        for chart in group
    ]


def _bin_label(number: int, count: int) -> str:
    end = " (lowest)" if number == 0 else " (highest)" if number == count - 1 else ""
    return f"bin {number}{end}"


def geometry_charts(numbers: Mapping[str, Any]) -> list[Chart]:
    """Angles and norms of the terms' gradients by bin; of each arm and space the last measurement."""
    charts, kinds = [], []
    last = {(entry["arm"], entry["space"]): place for place, entry in enumerate(numbers["geometry"])}
    for place in last.values():
        entry = numbers["geometry"][place]
        arm = f" — {numbers['arms'][entry['arm']]['name']}" if len(numbers["arms"]) > 1 else ""
        at, name = f"geometry.{place}", f"geometry-{entry['arm']}-{entry['space']}"
        note = f"step {entry['step']}, {SPACES[entry['space']]}, {entry['method']}"
        angles = [_by_bin(pair.replace("-", " and "), at, "angles", pair, hue) for hue, pair in enumerate(PAIRS)]
        norms = [_by_bin(term, at, "norms", term, hue) for hue, term in enumerate(("standard", "language", "visual"))]
        x_label = "bin of visual dependency"
        charts.append(Chart(f"{name}-angles", f"Angles{arm}", note, "degrees", x_label, tuple(angles)))
        charts.append(Chart(f"{name}-norms", f"Norms{arm}", note, "", x_label, tuple(norms)))
        kinds += [("angles", entry["space"]), ("norms", entry["space"])]
    for place, entry in enumerate(numbers.get("course", ())):
        for tokens, title in (("all", "all tokens"), ("highest", "highest bin")):
            lines = [
                Line(
                    pair.replace("-", " and "),
                    f"course.{place}.steps",
                    f"course.{place}.{tokens}.{pair}",
                    hue=hue,
                    dots=True,
                )
                for hue, pair in enumerate(PAIRS)
            ]
            name = f"course-{entry['arm']}-{entry['space']}-{tokens}"
            arm = f" — {numbers['arms'][entry['arm']]['name']}" if len(numbers["arms"]) > 1 else ""
            note = f"{title}, over training, {SPACES[entry['space']]}"
            charts.append(Chart(name, f"Angles{arm}", note, "degrees", "step", tuple(lines)))
            kinds.append(("course", entry["space"], tokens))
    return _comparable(charts, kinds)


def _by_bin(label: str, at: str, what: str, name: str, hue: int) -> Line:
    return Line(label, f"{at}.bins", f"{at}.{what}.{name}", error=f"{at}.errors.{what}.{name}", hue=hue, dots=True)


def all_charts(numbers: Mapping[str, Any]) -> dict[str, list[Chart]]:
    """Section -> its charts."""
    return {
        "curves": curve_charts(numbers, main=True),
        "more": curve_charts(numbers, main=False),
        "bins": bin_charts(numbers),
        "geometry": geometry_charts(numbers),
    }


# ---- scales


def points(numbers: Mapping[str, Any], line: Line) -> list[tuple[float, float]]:
    """The points of a line that have a value."""
    pairs = zip(look_up(numbers, line.x), look_up(numbers, line.y), strict=True)
    return [(float(x), float(y)) for x, y in pairs if y is not None]


def bands(numbers: Mapping[str, Any], line: Line) -> list[tuple[float, float, float]]:
    """(x, low, high) of a line's band or error bars, where there are some."""
    xs, ys = look_up(numbers, line.x), look_up(numbers, line.y)
    if line.error is not None:
        try:
            errors = look_up(numbers, line.error)
        except (KeyError, TypeError):
            return []
        return [(x, y - e, y + e) for x, y, e in zip(xs, ys, errors, strict=True) if y is not None and e]
    if line.low is None or line.high is None:
        return []
    rows = zip(xs, look_up(numbers, line.low), look_up(numbers, line.high), strict=True)
    return [(float(x), low, high) for x, low, high in rows if low is not None and high is not None]


def extent(numbers: Mapping[str, Any], chart: Chart) -> tuple[float, float, float, float]:
    """(left, right, bottom, top) of a chart. A band of few seeds may leave it: the curves set the scale."""
    lines = (*chart.lines, *chart.beside)
    found = [point for line in lines for point in points(numbers, line)]
    found += [point for line in lines for run in line.runs for point in points(numbers, replace(line, y=run))]
    xs, ys = [x for x, _ in found] or [0.0, 1.0], [y for _, y in found] or [0.0, 1.0]
    low, high = min(ys), max(ys)
    reach = (high - low) or abs(high) or 1.0
    outer = [value for line in lines for _, *pair in bands(numbers, line) for value in pair]
    low, high = max(min([low, *outer]), low - 0.6 * reach), min(max([high, *outer]), high + 0.6 * reach)
    margin = 0.06 * ((high - low) or reach)
    # Nothing here is below 0 but for policy losses and rewards: where it is near, the axis begins there.
    bottom = 0.0 if min(ys) >= 0 and low - margin < 0.35 * (high - low) else low - margin
    top = high + margin
    if chart.unit == "share":
        bottom, top = max(bottom, 0.0), min(top, 1.0)
    left, right = min(xs), max(xs)
    return left, (right if right > left else left + 1), bottom, (top if top > bottom else bottom + 1)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two ends."""
    raw = (high - low) / count
    size = 10 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_text(value: float, unit: str) -> str:
    """A tick's number."""
    if unit == "share":
        return f"{100 * value:.4g} %"
    text = f"{value:.6g}"
    return f"{value:.0e}" if len(text) > 7 else text
