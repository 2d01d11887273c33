"""How well a model answers the task's questions: its greedy answers, right ones and rightly read digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import Qwen3VLForConditionalGeneration

from ..data.responses import response_texts
from ..evaluation.sampling import Sampling, sample_responses
from .models import DigitsProcessor
from .pictures import Example, digits_read, scorer

if TYPE_CHECKING:
    from .privileged import Question

BATCH_SIZE, MAX_TOKENS = 128, 32  # no answer of the task has more tokens


def greedy_answers(
    model: Qwen3VLForConditionalGeneration,
    processor: DigitsProcessor,
    questions: Sequence[Example | Question],
    max_new_tokens: int = MAX_TOKENS,
) -> list[list[int]]:
    """Token ids of the greedy answers, up to and including the end token.

    Args:
        model, processor: of the task.
        questions: what is asked, each as its `record`.
        max_new_tokens: of the longest answer.
    """
    records = [question.record() for question in questions]
    sampling = Sampling(max_new_tokens=max_new_tokens)
    return sample_responses(model, processor, records, sampling, batch_size=BATCH_SIZE, progress=False)


def grade(
    processor: DigitsProcessor, questions: Sequence[Example | Question], answers: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Fractions of right answers (``answers``) and of rightly read digits (``digits``).

    Args:
        processor: of the model that answered.
        questions: what was asked.
        answers: token ids, one response to each question.
    """
    texts = response_texts(processor, answers)
    right = sum(scorer(text, question.answer) for text, question in zip(texts, questions, strict=True))
    read = sum(digits_read(text, question) for text, question in zip(texts, questions, strict=True))
    return {"answers": right / len(questions), "digits": read / sum(len(question.read) for question in questions)}


def accuracy(
    model: Qwen3VLForConditionalGeneration, processor: DigitsProcessor, questions: Sequence[Example | Question]
) -> dict[str, float]:
    """``grade`` of the model's greedy answers."""
    return grade(processor, questions, greedy_answers(model, processor, questions))
