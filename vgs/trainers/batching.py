"""Which responses go together: through the models in a pass of bounded size, and in a micro-batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..models.groups import PromptGroup, numbered, select_responses


def plan_passes(
    groups: Sequence[PromptGroup],
    max_tokens: int | None,
    *,
    text: bool = True,
    share_prefix: bool = True,
    strict: bool = True,
) -> list[list[int]]:
    """Bin packing by length: first fit, longest first. Responses to one prompt stay together where they fit.

    Args:
        groups: prompts with their responses.
        max_tokens: tokens of one pass, prompts and both views included; None puts everything into one pass.
        text: whether the text-only view runs too.
        share_prefix: whether responses in one pass share their prompt.
        strict: with False a response that is longer than ``max_tokens`` has a pass of its own.

    Returns:
        For every pass the sorted numbers of its responses, counted over all groups.

    Raises:
        ConfigError: one response with its prompt is longer than ``max_tokens``, and ``strict``.
    """
    if max_tokens is None:
        count = sum(len(group.responses) for group in groups)
        return [list(range(count))] if count else []
    items: list[tuple[int, list[int]]] = []
    for group, numbers in numbered(groups):
        part: list[int] = []
        for index in range(len(numbers)):
            alone = group.select([index]).tokens(text)
            if strict and alone > max_tokens:
                raise ConfigError(
                    f"A response of {len(group.responses[index])} tokens needs {alone} tokens with its prompt"
                    f"{' in both views' if text else ''}, more than max_tokens_per_pass={max_tokens}. Raise the "
                    "budget, or lower max_prompt_length or max_completion_length."
                )
            if part and (not share_prefix or group.select([*part, index]).tokens(text) > max_tokens):
                items.append((group.select(part).tokens(text), [numbers[i] for i in part]))
                part = []
            part.append(index)
        if part:
            items.append((group.select(part).tokens(text), [numbers[i] for i in part]))
    bins: list[tuple[int, list[int]]] = []
    for size, numbers in sorted(items, key=lambda item: item[0], reverse=True):
        place = next((i for i, (used, _) in enumerate(bins) if used + size <= max_tokens), None)
        if place is None:
            bins.append((size, numbers))
        else:
            used, members = bins[place]
            bins[place] = (used + size, members + numbers)
    return [sorted(members) for _, members in bins]


def split_batch(batch: Mapping[str, Any], parts: int, per_response: Sequence[str]) -> list[dict[str, Any]]:
    """A sampled batch as micro-batches of as many consecutive responses each.

    Args:
        batch: ``groups``, entries with one value per response, and entries that all parts share.
        parts: how many; responses that are left over are dropped.
        per_response: names of the entries with one value per response.
    """
    size = len(batch[per_response[0]]) // parts
    return [
        {
            **batch,
            "groups": select_responses(batch["groups"], range(first, first + size)),
            **{name: batch[name][first : first + size] for name in per_response},
        }
        for first in range(0, size * parts, size)
    ]
