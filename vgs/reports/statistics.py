"""Means over seeds with their intervals, without a package for statistics."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence


def _central_share(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t distribution, by its finite series for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


@functools.cache
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """The t for which P(|T| <= t) is ``level``.

    Args:
        degrees: of freedom, at least 1.
        level: in (0, 1).
    """
    low, high = 0.0, 1.0
    while _central_share(high, degrees) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_share(middle, degrees) < level else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean, and half the width of its t-interval (NaN for a single value).

    Args:
        values: one per seed.
        level: the interval's confidence.
    """
    if len(values) < 2:
        return statistics.fmean(values), math.nan
    half = t_quantile(len(values) - 1, level) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half
