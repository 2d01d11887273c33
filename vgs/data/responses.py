"""Generated rows of tokens as responses, and responses as text: one way for training, evaluation and the demo."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

from ..models.tokenizers import tokenizer_of


def cut_responses(rows: Tensor, ends: Collection[int]) -> list[list[int]]:
    """Rows of generated tokens as responses, each up to and including its first end token.

    Args:
        rows: [B, C] int64, what ``generate`` appended to the prompts; padding may follow the end.
        ends: ids of the end tokens.

    Returns:
        For every row its token ids; all C of them where it does not end.
    """
    cut = []
    for row in rows.tolist():
        length = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        cut.append(row[:length])
    return cut


def response_texts(processor: Any, responses: Iterable[Sequence[int] | Tensor]) -> list[str]:
    """What responses say, without special tokens.

    Args:
        processor: a processor or a tokenizer.
        responses: token ids of each response.
    """
    tokenizer = tokenizer_of(processor)
    return tokenizer.batch_decode(list(responses), skip_special_tokens=True)
