"""Responses that somebody else has written, as the tokens that a student would have sampled."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from ..models.tokenizers import tokenizer_of

MARK = "§"  # not in any template
SHOWN = 3  # bad rows that a message names


def end_of_turn(processor: Any, **template_options: Any) -> int:
    """The token that ends an assistant's turn: the special one that the chat template writes after it, else the
    tokenizer's end token.

    Args:
        processor: a model's, or its tokenizer.
        **template_options: for the chat template.
    """
    tokenizer = tokenizer_of(processor)
    turns = [("user", "."), ("assistant", MARK)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    try:
        text = processor.apply_chat_template(messages, tokenize=False, **template_options)
    except Exception:  # whatever a template makes of a turn that it does not expect
        return tokenizer.eos_token_id
    after = tokenizer(text.rpartition(MARK)[2].lstrip(), add_special_tokens=False)["input_ids"] if MARK in text else []
    return after[0] if after and after[0] in tokenizer.all_special_ids else tokenizer.eos_token_id


def as_responses(value: Any) -> list[Any]:
    """The cell of a row as a list of responses, each a text or a list of token ids.

    Args:
        value: a text, token ids, or a list of either.

    Raises:
        ValueError: anything else, or no response.
    """
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(x) is int for x in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"responses must be a text, token ids, or a list of either, got {value!r}")
    for response in value:
        ids = isinstance(response, list) and response and all(type(x) is int and x >= 0 for x in response)
        if not ids and not (isinstance(response, str) and response):
            raise ValueError(f"a response must be a text or a list of token ids, got {response!r}")
    return value


def recorded_ids(tokenizer: Any, value: Any, end: int) -> list[list[int]]:
    """Token ids of the responses in a row's cell, each with its end token.

    Args:
        tokenizer: the student's.
        value: see ``as_responses``; token ids are taken as they are.
        end: of ``end_of_turn``.

    Raises:
        ValueError: as ``as_responses``.
    """
    found = []
    for response in as_responses(value):
        ids = response if isinstance(response, list) else tokenizer(response, add_special_tokens=False)["input_ids"]
        found.append([*ids] if isinstance(response, list) or ids[-1:] == [end] else [*ids, end])
    return found


def bad_recordings(
    values: Sequence[Any],
    tokenizer: Any,
    end: int,
    *,
    count: int,
    longest: int | None,
    forbidden: Collection[int],
    vocabulary: int,
) -> list[tuple[int, str]]:
    """Cells that cannot be used: their places, and what is wrong with each.

    Args:
        values: of the column.
        tokenizer, end: as of ``recorded_ids``.
        count: responses that a row must have at least.
        longest: most tokens of a response; None: any number.
        forbidden: ids of image and video tokens.
        vocabulary: ids must be below it.
    """
    bad = []
    for index, value in enumerate(values):
        try:
            found = recorded_ids(tokenizer, value, end)
        except ValueError as error:
            bad.append((index, str(error)))
            continue
        tokens = {token for ids in found for token in ids}
        if len(found) < count:
            bad.append((index, f"{len(found)} responses, expected num_generations={count}"))
        elif longest is not None and (most := max(map(len, found[:count]))) > longest:
            bad.append((index, f"a response of {most} tokens, more than max_completion_length={longest}"))
        elif stray := tokens & set(forbidden):
            bad.append((index, f"the image or video token {min(stray)} in a response"))
        elif tokens and max(tokens) >= vocabulary:
            bad.append((index, f"the token id {max(tokens)}, expected ids below {vocabulary}"))
    return bad
