"""Scores of a benchmark that has run, question by question."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import ConfigError


@dataclass(frozen=True)
class TaskScores:
    """What a model scored on a benchmark.

    Attributes:
        questions: number of each in the dataset, and a fingerprint of its text and gold answer.
        scores: [Q, k] float64, 1 for a right response and 0 for a wrong one.
        cut_off: share of the first responses that were as long as a response may be; None: not recorded.
    """

    questions: tuple[tuple[int, str], ...]
    scores: np.ndarray
    cut_off: float | None = None


def _fingerprint(text: str, gold: str) -> str:
    """Of a question; lmms-eval's own ``doc_hash`` is the same for all questions."""
    return hashlib.sha256(json.dumps([text, gold]).encode()).hexdigest()[:16]


def read_scores(folder: Path, repeats: int, max_new_tokens: int | None = None) -> TaskScores:
    """Read the folder of a benchmark that has run.

    Args:
        folder: of ``harness.run_task``.
        repeats: responses to each question.
        max_new_tokens: longest response, in tokens.

    Raises:
        ConfigError: it has no samples, or another number of responses to a question.
    """
    path = folder / "samples.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        rows.sort(key=lambda row: row["doc_id"])
        questions = tuple((int(row["doc_id"]), _fingerprint(row["input"], row["target"])) for row in rows)
        scores = [row["scores"] for row in rows]
        lengths = [count["output_tokens"] for row in rows for count in row.get("token_counts") or () if count]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} must hold lmms-eval's samples with our scores, got {error!r}.") from error
    if not rows:
        raise ConfigError(f"{path} must hold a line for every question, got none.")
    if len({number for number, _ in questions}) != len(rows):
        raise ConfigError(f"{path} has a question twice.")
    if odd := [number for (number, _), row in zip(questions, scores, strict=True) if len(row) != repeats]:
        raise ConfigError(f"{path} must have {repeats} scores for every question, got another number for {odd[0]}.")
    cut_off = None
    if max_new_tokens is not None and len(lengths) == len(rows):
        cut_off = float(np.mean([length >= max_new_tokens for length in lengths]))
    return TaskScores(questions, np.asarray(scores, dtype=np.float64), cut_off)
