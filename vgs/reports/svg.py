"""Charts as SVG: colours come from the page's style, so that they follow light and dark."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .charts import Chart, Line, bands, extent, points, tick_text, ticks

WIDTH, HEIGHT = 360.0, 224.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 10.0, 10.0, 37.0
RIGHT_ANGLE = 90.0
#: Beside the colour, so that lines can be told apart without it.
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "12 3", "1 2", "6 2 1 2")


def line_style(line: Line) -> tuple[str, str]:
    """(classes, style) of a line."""
    if line.shade is not None:
        share = f"{100 * line.shade:.0f}%"
        return "line", f"stroke:color-mix(in oklab,var(--bin-high) {share},var(--bin-low))"
    number = line.arm if line.arm is not None else line.hue or 0
    kind = f"arm arm-{number}" if line.arm is not None else "line"
    dash = DASHES[number % len(DASHES)]
    return kind, f"stroke:var(--hue-{number % 8})" + (f";stroke-dasharray:{dash}" if dash else "")


def line_chart(numbers: Mapping[str, Any], chart: Chart) -> str:
    """A chart of lines, with a title and a description for those who do not see it.

    Args:
        numbers: of ``collect``. chart: what is drawn.
    """
    left, right, bottom, top = extent(numbers, chart)
    across = (WIDTH - LEFT - RIGHT) / (right - left)
    up = (HEIGHT - TOP - BOTTOM) / (top - bottom)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - left) * across, HEIGHT - BOTTOM - (y - bottom) * up

    parts = []
    for value in ticks(bottom, top):
        _, y = place(left, value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6:g}" y="{y + 3.5:.1f}" class="end">{tick_text(value, chart.unit)}</text>')
    for value in ticks(left, right, 5):
        if value == int(value):
            x, _ = place(value, bottom)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16:g}" class="middle">{int(value)}</text>')
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{base:g}" y2="{base:g}"/>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text x="{middle:g}" y="{HEIGHT - 4:g}" class="middle faint">{chart.x_label}</text>')
    clip = f"clip-{chart.name}"
    box = f'x="{LEFT:g}" y="{TOP:g}" width="{WIDTH - LEFT - RIGHT:g}" height="{HEIGHT - TOP - BOTTOM:g}"'
    if chart.unit == "degrees" and bottom < RIGHT_ANGLE < top:
        _, y = place(left, RIGHT_ANGLE)
        parts.append(f'<line class="mark" x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT + 4:g}" y="{y - 4:.1f}">90°</text>')
    parts.append(f'<clipPath id="{clip}"><rect {box}/></clipPath><g clip-path="url(#{clip})">')
    for line in chart.lines:
        parts.append(_band(numbers, line, place))
        parts += [_run(numbers, replace(line, y=run), place) for run in line.runs]
    parts.append("</g>")
    for row, line in enumerate(chart.lines):
        parts.append(_line(numbers, line, row, place))
    references = [
        {"label": line.label, "x": line.x, "y": line.y, "low": line.low, "high": line.high} for line in chart.lines
    ]
    frame = {"left": left, "right": right, "bottom": bottom, "top": top, "unit": chart.unit, "lines": references}
    described = f"{chart.title}: {chart.note or chart.unit}, by {chart.x_label}. The numbers are in the table below it."
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" tabindex="0" class="chart" '
        f'aria-labelledby="t-{chart.name} d-{chart.name}" data-chart="{html.escape(json.dumps(frame))}">'
        f'<title id="t-{chart.name}">{html.escape(chart.title)}</title>'
        f'<desc id="d-{chart.name}">{html.escape(described)}</desc>{"".join(parts)}'
        f'<line class="cross" x1="0" x2="0" y1="{TOP:g}" y2="{base:g}"/></svg>'
    )


def _band(numbers: Mapping[str, Any], line: Line, place: Any) -> str:
    rows = bands(numbers, line)
    if not rows:
        return ""
    kind, style = line_style(line)
    if line.error is not None:
        bars = []
        for x, low, high in rows:
            (at, start), (_, end) = place(x, low), place(x, high)
            bars.append(f'<line class="{kind} bar" style="{style}" x1="{at:.1f}" x2="{at:.1f}" y1="{start:.1f}" ')
            bars.append(f'y2="{end:.1f}"/>')
        return "".join(bars)
    there = [place(x, high) for x, _, high in rows]
    back = [place(x, low) for x, low, _ in reversed(rows)]
    outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*there, *back])
    fill = style.split(";")[0].replace("stroke:", "fill:")
    return f'<polygon class="{kind} band" style="{fill}" points="{outline}"/>'


def _run(numbers: Mapping[str, Any], line: Line, place: Any) -> str:
    kind, style = line_style(line)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points(numbers, line)))
    return f'<polyline class="{kind} single" style="{style}" points="{path}"/>'


def _line(numbers: Mapping[str, Any], line: Line, row: int, place: Any) -> str:
    kind, style = line_style(line)
    found = [place(x, y) for x, y in points(numbers, line)]
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in found)
    drawn = f'<polyline class="{kind}" style="{style}" data-row="{row}" points="{path}"/>'
    if line.dots or len(found) == 1:
        fill = style.split(";")[0].replace("stroke:", "fill:")
        drawn += "".join(
            f'<circle class="{kind} dot" style="{fill}" cx="{x:.2f}" cy="{y:.2f}" r="2.6"/>' for x, y in found
        )
    return drawn
