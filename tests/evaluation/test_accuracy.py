"""Greedy accuracy: what counts, and what does not."""

from __future__ import annotations

import pytest
from tiny import tiny_model, tiny_processor, tiny_samples

from vgs.errors import ConfigError
from vgs.evaluation.accuracy import evaluate_accuracy


def test_samples_without_a_gold_answer_do_not_count() -> None:
    samples = [{**sample, "answer": gold} for sample, gold in zip(tiny_samples(4), ("a", None, "b", None), strict=True)]
    asked: list[str] = []

    def scorer(text: str, gold: str) -> bool:
        asked.append(gold)
        return gold == "a"

    options = {"batch_size": 4, "max_new_tokens": 2}
    result = evaluate_accuracy(tiny_model(), tiny_processor(), samples, scorer, **options)
    assert asked == ["a", "b"]
    assert (result["accuracy"], result["samples"]) == (0.5, 2)
    with pytest.raises(ConfigError, match="None of the 4 samples has a gold answer"):
        evaluate_accuracy(
            tiny_model(), tiny_processor(), [{**sample, "answer": None} for sample in samples], scorer, **options
        )
