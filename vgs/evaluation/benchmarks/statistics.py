"""Intervals of accuracies and paired tests of two models, all of SciPy's.

Acc@1 is the share of questions that one greedy response answers: its interval is Wilson's. Acc@k is the mean over
questions of the share of k sampled responses that are right: its interval is Student's over questions, which are what
is drawn; the k responses to one are no further questions. Two models answer the same questions: their difference is
Student's paired test over questions, and for Acc@1 also McNemar's exact one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import ConfigError
from .results import TaskScores

LEVEL = 0.95


def scipy_stats() -> Any:
    """The module ``scipy.stats``.

    Raises:
        ConfigError: SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ConfigError("Intervals and tests need scipy: pip install scipy (extra `eval`).") from error
    return stats


def accuracy(scores: TaskScores) -> dict[str, Any]:
    """Accuracy on one benchmark.

    Args:
        scores: of one response to each question, or several.

    Returns:
        ``accuracy``, ``low`` and ``high`` (fractions; the interval is None where all questions score the same and there
        are several responses), ``error`` (standard error), ``questions`` and ``responses`` (to each).
    """
    stats = scipy_stats()
    means = scores.scores.mean(axis=1)
    count, repeats = scores.scores.shape
    found: dict[str, Any] = {"accuracy": float(means.mean()), "questions": count, "responses": repeats}
    found["error"] = float(means.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    low = high = None
    if repeats == 1:
        low, high = stats.binomtest(int(means.sum()), count).proportion_ci(LEVEL, method="wilson")
    elif count > 1 and np.ptp(means) > 0:
        low, high = stats.ttest_1samp(means, 0.0).confidence_interval(LEVEL)
        low, high = max(low, 0.0), min(high, 1.0)
    return {**found, "low": None if low is None else float(low), "high": None if high is None else float(high)}


def difference(after: TaskScores, before: TaskScores) -> dict[str, Any]:
    """How much better a model is than another on the same questions.

    Args:
        after, before: of the same questions.

    Returns:
        ``difference`` (after - before, a fraction), ``low``, ``high``, ``error`` and ``p`` of the paired t-test (None
        where all differences are equal), ``questions``; of one response each also ``mcnemar_p`` with ``gained`` and
        ``lost``: questions that only the one and only the other model answers.

    Raises:
        ConfigError: they answered other questions.
    """
    if after.questions != before.questions:
        raise ConfigError(
            f"the two models must have answered the same questions, got {len(after.questions)} and "
            f"{len(before.questions)} of which {len(set(after.questions) & set(before.questions))} are the same."
        )
    stats = scipy_stats()
    means = after.scores.mean(axis=1), before.scores.mean(axis=1)
    gaps = means[0] - means[1]
    found: dict[str, Any] = {"difference": float(gaps.mean()), "questions": len(gaps)}
    found |= dict.fromkeys(("low", "high", "error", "p"))
    if len(gaps) > 1:
        found["error"] = float(gaps.std(ddof=1) / math.sqrt(len(gaps)))
        if np.ptp(gaps) > 0:
            test = stats.ttest_rel(*means)
            interval = test.confidence_interval(LEVEL)
            found |= {"low": float(interval.low), "high": float(interval.high), "p": float(test.pvalue)}
    if after.scores.shape[1] == before.scores.shape[1] == 1:
        gained, lost = int((gaps > 0).sum()), int((gaps < 0).sum())
        exact = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        found |= {"gained": gained, "lost": lost, "mcnemar_p": float(exact)}
    return found


def mean_of(parts: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The plain mean over benchmarks, as the paper's tables have it, with a normal interval.

    Args:
        parts: of ``accuracy`` or ``difference``, one for each benchmark.
        name: ``accuracy`` or ``difference``.

    Returns:
        ``name``, ``low``, ``high``, ``error`` and, of differences, ``p``; benchmarks count as independent.
    """
    value = float(np.mean([part[name] for part in parts]))
    found: dict[str, Any] = {name: value, "benchmarks": len(parts), **dict.fromkeys(("low", "high", "error"))}
    if name == "difference":
        found["p"] = None
    if any(part["error"] is None for part in parts):
        return found
    error = math.sqrt(sum(part["error"] ** 2 for part in parts)) / len(parts)
    found["error"] = error
    if error > 0:
        normal = scipy_stats().norm
        reach = float(normal.ppf(0.5 + LEVEL / 2)) * error
        found |= {"low": value - reach, "high": value + reach}
        if name == "difference":
            found["p"] = float(2 * normal.sf(abs(value) / error))
    return found
