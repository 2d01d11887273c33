"""Generated rows as responses: where they end, and what they say."""

from __future__ import annotations

import torch
from tiny import SPECIAL, tiny_processor

from vgs.data.responses import cut_responses, response_texts

PAD, END = SPECIAL.index("<|pad|>"), SPECIAL.index("<|im_end|>")


def test_a_response_ends_with_its_first_end_token() -> None:
    rows = torch.tensor([[20, 21, END, PAD], [END, 20, END, PAD], [20, 30, 22, END], [20, 21, 22, 23]])
    expected = [[20, 21, END], [END], [20, 30, 22, END], [20, 21, 22, 23]]
    assert cut_responses(rows, {END}) == expected
    assert cut_responses(rows, [END, 30])[2] == [20, 30]
    assert cut_responses(rows[:0], {END}) == [] and cut_responses(rows[:, :0], {END}) == [[], [], [], []]


def test_texts_are_without_special_tokens() -> None:
    processor = tiny_processor()
    ids = processor.tokenizer("red blue one")["input_ids"]
    for reader in (processor, processor.tokenizer):
        assert response_texts(reader, [[*ids, END], torch.tensor(ids), []]) == ["red blue one", "red blue one", ""]
