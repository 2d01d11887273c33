"""Figures of a run: learning curves of several arms, and answers whose words are coloured by visual dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#4477aa", "#cc6677", "#228833", "#aa7733")
INK, FAINT = "#222222", "#999999"
HEAT = "YlOrRd"

# one seed's curve: steps and values
Curve = tuple[Sequence[float], Sequence[float]]


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, without a display or pyplot's global state."""
    FigureCanvasAgg(figure).print_png(str(path))


def learning_curves(path: Path, panels: Mapping[str, Mapping[str, Sequence[Curve]]], title: str) -> None:
    """One panel per quantity, one line per arm: the mean over seeds, with the range over seeds as a band.

    Args:
        path: PNG file to write.
        panels: panel title -> arm -> one (steps, values) pair per seed; the seeds of an arm share their steps.
        title: of the whole figure.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.7 * rows + 0.7), dpi=150, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (name, arms) in zip(axes.flat, panels.items(), strict=False):
        for colour, (arm, curves) in zip(COLOURS, arms.items(), strict=False):
            steps, values = np.asarray(curves[0][0]), np.asarray([curve[1] for curve in curves], dtype=float)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, values.mean(axis=0), color=colour, label=arm, linewidth=1.6)
        axis.set_title(name, fontsize=10, color=INK)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=11, color=INK)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save(figure, path)


@dataclass(frozen=True)
class ColouredAnswer:
    """Words with a value each (nats), who says them, and whether the answer is right."""

    speaker: str
    words: Sequence[str]
    values: Sequence[float]
    right: bool


@dataclass(frozen=True)
class AnswerSheet:
    """A picture, the question about it, the right answer and what several speakers answered."""

    image: Any  # PIL image
    question: str
    gold: str
    answers: Sequence[ColouredAnswer]


def answer_sheets(path: Path, sheets: Sequence[AnswerSheet], title: str, scale: str) -> None:
    """Sample pictures with their answers, each word on a background coloured by its value.

    Args:
        path: PNG file to write.
        sheets: one block each, top to bottom.
        title: of the whole figure.
        scale: what the colours mean, written at the colour bar.
    """
    size, glyph, line = 9.0, 0.602 * 9.0 / 72, 0.25  # points; inches per character of the monospaced font; inches
    margin, picture, speaker = 0.25, 1.9, 0.95
    longest = max(sum(len(w) + 1 for w in answer.words) for sheet in sheets for answer in sheet.answers)
    widest = max(longest * glyph, max(len(sheet.question) + len(sheet.gold) + 13 for sheet in sheets) * glyph)
    blocks = [line * (len(sheet.answers) + 1) + 0.3 for sheet in sheets]
    width, height = picture + speaker + widest + 3 * margin + 0.5, sum(blocks) + 1.35
    figure = Figure(figsize=(width, height), dpi=150)
    font = {"family": "DejaVu Sans Mono", "size": size, "va": "center"}
    highest = max((value for sheet in sheets for answer in sheet.answers for value in answer.values), default=1.0)
    norm, heat = Normalize(0.0, max(highest, 1e-6)), colormaps[HEAT]

    def write(x: float, y: float, text: str, **options: Any) -> None:
        figure.text(x / width, y / height, text, **{**font, **options})

    write(margin, height - 0.3, title, family="DejaVu Sans", size=11, color=INK)
    top = height - 0.6
    left = 2 * margin + picture
    for sheet, block in zip(sheets, blocks, strict=True):
        shape = np.asarray(sheet.image).shape
        box = (block - 0.3, picture)
        shrink = min(box[0] / shape[0], box[1] / shape[1])
        tall, wide = shape[0] * shrink, shape[1] * shrink
        axis = figure.add_axes(
            ((margin + (picture - wide) / 2) / width, (top - 0.1 - tall) / height, wide / width, tall / height)
        )
        axis.imshow(np.asarray(sheet.image), interpolation="nearest")
        axis.set_axis_off()
        y = top - 0.2
        write(left, y, f"{sheet.question}  (answer: {sheet.gold})", color=INK, weight="bold")
        for answer in sheet.answers:
            y -= line
            colour = "#22763a" if answer.right else "#b03030"
            write(left, y, f"{answer.speaker} {'✓' if answer.right else '✗'}", color=colour, family="DejaVu Sans")
            x = left + speaker
            for word, value in zip(answer.words, answer.values, strict=True):
                shade = heat(norm(value))
                luminance = float(np.dot(shade[:3], (0.299, 0.587, 0.114)))
                box_style = {"boxstyle": "square,pad=0.18", "facecolor": shade, "edgecolor": "none"}
                write(x, y, word, color=INK if luminance > 0.45 else "white", bbox=box_style)
                x += (len(word) + 1) * glyph
        top -= block
    bar = figure.add_axes((left / width, 0.45 / height, 3.0 / width, 0.12 / height))
    figure.colorbar(ScalarMappable(norm, heat), cax=bar, orientation="horizontal").outline.set_visible(False)
    bar.tick_params(labelsize=8, colors=INK)
    write(left + 3.2, 0.5, scale, family="DejaVu Sans", color=INK)
    save(figure, path)
