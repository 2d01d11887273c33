"""The unit of scoring: one prompt in both views, and the responses that were sampled to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Multimodal fields with one value per token; every other one belongs to the images and exists in one view only.
PER_TOKEN_FIELDS = ("mm_token_type_ids", "token_type_ids")


def placed(fields: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Multimodal fields of a prompt, those of its images on a device.

    Args:
        fields: as of ``PromptGroup.images``.
        device: of the image fields; per-token fields stay where they are.
    """
    return {name: x if name in PER_TOKEN_FIELDS else x.to(device) for name, x in fields.items()}


@dataclass(frozen=True)
class PromptGroup:
    """One prompt in both views and G responses to it.

    Attributes:
        prompt_ids: [P] int64 on the CPU, image placeholders expanded.
        text_prompt_ids: [Q] int64 on the CPU, the same prompt rendered without its evidence: images, marked texts.
        responses: G tensors [T_g] int64 on the CPU.
        images: the image fields of this prompt alone, as its family's forward takes them (``pixel_values``,
            ``image_grid_thw``, ...); per-token fields (``token_type_ids``, ``mm_token_type_ids``) are [P].
    """

    prompt_ids: Tensor
    text_prompt_ids: Tensor
    responses: tuple[Tensor, ...]
    images: dict[str, Tensor]

    @property
    def has_images(self) -> bool:
        return "pixel_values" in self.images

    @property
    def response_lengths(self) -> list[int]:
        return [len(response) for response in self.responses]

    def tokens(self, text: bool = True) -> int:
        """Tokens of one packed pass over the multimodal view, and over the text-only one if ``text``."""
        answers = sum(self.response_lengths)
        return len(self.prompt_ids) + answers + (len(self.text_prompt_ids) + answers if text else 0)

    def select(self, responses: Sequence[int]) -> PromptGroup:
        """The same prompt with some of its responses."""
        return replace(self, responses=tuple(self.responses[index] for index in responses))

    def alone(self) -> Iterator[PromptGroup]:
        """One group for each response."""
        for index in range(len(self.responses)):
            yield self.select([index])


def response_lengths(groups: Sequence[PromptGroup]) -> list[int]:
    """Lengths of all responses, in the order in which their tokens are compacted.

    Args:
        groups: prompts with their responses.
    """
    return [length for group in groups for length in group.response_lengths]


def trajectory_ids(groups: Sequence[PromptGroup]) -> Tensor:
    """[N] int64: the response (0, 1, ...) that each compacted token belongs to.

    Args:
        groups: prompts with their responses, N response tokens in all.
    """
    lengths = torch.tensor(response_lengths(groups), dtype=torch.int64)
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def response_ids(groups: Sequence[PromptGroup]) -> Tensor:
    """[N] int64 on the CPU: the compacted response tokens."""
    responses = [response for group in groups for response in group.responses]
    return torch.cat(responses) if responses else torch.zeros(0, dtype=torch.int64)


def numbered(groups: Sequence[PromptGroup]) -> Iterator[tuple[PromptGroup, list[int]]]:
    """Every group with the numbers of its responses, counted over all groups."""
    first = 0
    for group in groups:
        yield group, list(range(first, first + len(group.responses)))
        first += len(group.responses)


def select_responses(groups: Sequence[PromptGroup], chosen: Sequence[int]) -> list[PromptGroup]:
    """The groups with some of their responses (numbered over all groups); groups that keep none are left out."""
    wanted = set(chosen)
    kept = []
    for group, numbers in numbered(groups):
        if inside := [index for index, number in enumerate(numbers) if number in wanted]:
            kept.append(group.select(inside))
    return kept
