"""The greedy accuracy of a model on image questions, without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..data.answers import answers_match
from ..data.responses import response_texts
from ..errors import ConfigError
from .sampling import sample_responses


def evaluate_accuracy(
    model: nn.Module,
    processor: Any,
    samples: Any,
    scorer: Callable[[str, str], bool] = answers_match,
    batch_size: int = 8,
    max_new_tokens: int = 2048,
) -> dict[str, float]:
    """Answer every sample greedily and count the right answers.

    Args:
        model, processor, batch_size, max_new_tokens: see ``sampling.sample_responses``.
        samples: sequence of dicts with ``prompt``, ``images`` and ``answer``.
        scorer: ``scorer(response_text, gold_answer) -> bool``.

    Returns:
        ``accuracy`` (fraction), ``samples`` and ``mean_length`` (tokens per response).

    Raises:
        ConfigError: no samples, or samples without ``answer``.
    """
    if len(samples) == 0 or "answer" not in samples[0]:
        raise ConfigError(f"samples must have gold answers in 'answer', got {len(samples)} samples without.")
    answers = sample_responses(model, processor, samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    texts = response_texts(processor, answers)
    correct = sum(scorer(text, samples[i]["answer"]) for i, text in enumerate(texts))
    tokens = sum(map(len, answers))
    return {"accuracy": correct / len(samples), "samples": len(samples), "mean_length": tokens / len(samples)}
