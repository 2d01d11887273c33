"""The greedy accuracy of a model on image questions, without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..data.answers import answers_match
from ..data.responses import response_texts
from ..errors import ConfigError
from .sampling import Sampling, sample_responses


def evaluate_accuracy(
    model: nn.Module,
    processor: Any,
    samples: Any,
    scorer: Callable[[str, str], bool] = answers_match,
    batch_size: int = 8,
    sampling: Sampling | None = None,
) -> dict[str, float]:
    """Answer every sample, however long its prompt is, and count the right answers.

    Args:
        model, processor, batch_size: see ``sampling.sample_responses``.
        samples: sequence of dicts with ``prompt``, ``images`` and ``answer``; None: there is no gold answer, and the
            sample does not count.
        scorer: ``scorer(response_text, gold_answer) -> bool``.
        sampling: how the model is asked; None: greedily, see ``Sampling``.

    Returns:
        ``accuracy`` (fraction), ``samples`` (those with a gold answer) and ``mean_length`` (tokens per response).

    Raises:
        ConfigError: no samples, or none with a gold answer.
    """
    if len(samples) == 0 or "answer" not in samples[0]:
        raise ConfigError(f"samples must have gold answers in 'answer', got {len(samples)} samples without.")
    answers = sample_responses(model, processor, samples, sampling or Sampling(), batch_size=batch_size)
    texts = response_texts(processor, answers)
    golds = [samples[i].get("answer") for i in range(len(samples))]
    right = [scorer(text, gold) for text, gold in zip(texts, golds, strict=True) if gold is not None]
    if not right:
        raise ConfigError(f"None of the {len(samples)} samples has a gold answer: there is no accuracy to compute.")
    tokens = sum(map(len, answers))
    return {"accuracy": sum(right) / len(right), "samples": len(right), "mean_length": tokens / len(samples)}
