"""Pictures of the studies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..plots import COLOURS, FAINT, INK, Curve, save


def gap_study(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[Curve]]], gaps: Mapping[str, tuple[float, float]]
) -> None:
    """Curves of several arms (mean and range over seeds), and one bar with its interval per arm.

    Args:
        path: PNG file to write.
        panels: panel title -> arm -> one (steps, values) pair per seed.
        gaps: arm (or "before") -> KL gap in nats per token, and half the width of its interval (NaN: none).
    """
    count = len(panels) + 1
    figure = Figure(figsize=(4.0 * count, 3.6), dpi=150, layout="constrained")
    *axes, last = figure.subplots(1, count)
    colours = {}
    for axis, (name, arms) in zip(axes, panels.items(), strict=True):
        for colour, (arm, curves) in zip(COLOURS, arms.items(), strict=False):
            colours[arm] = colour
            steps, values = np.asarray(curves[0][0]), np.asarray([curve[1] for curve in curves], dtype=float)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, linewidth=0)
            axis.plot(steps, values.mean(axis=0), color=colour, label=arm, linewidth=1.6)
        axis.set_title(name, fontsize=10, color=INK)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    last.set_title("KL(start with clean digits || model), nats per token", fontsize=10, color=INK)
    for place, (arm, (mean, half)) in enumerate(gaps.items()):
        last.bar(place, mean, color=colours.get(arm, FAINT), yerr=None if math.isnan(half) else half, capsize=3)
    last.set_xticks(range(len(gaps)), [arm if arm == "before" else "" for arm in gaps], fontsize=8)
    for axis in (*axes, last):
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    save(figure, path)
