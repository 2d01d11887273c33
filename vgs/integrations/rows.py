"""A host's rows as prompt groups: one response each, and merged again where they share their prompt exactly."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.messages import has_evidence, is_evidence
from ..errors import ConfigError, config_errors
from ..models.families import backbone
from ..models.groups import PER_TOKEN_FIELDS, PromptGroup
from ..models.image_fields import MULTIMODAL_FIELDS


def host_row(
    prompt_ids: Tensor,
    text_prompt_ids: Tensor,
    response: Tensor,
    fields: Mapping[str, Any],
    placeholders: Sequence[int],
    *,
    name: str,
) -> PromptGroup:
    """One response of a host as a group of its own.

    Args:
        prompt_ids: [P] int64, image placeholders expanded.
        text_prompt_ids: [Q] int64, the same prompt rendered without its images.
        response: [T] int64; T may be 0.
        fields: what the host's processor made of the images; what no forward takes is left out.
        placeholders: ids of image and video tokens, see ``vgs.placeholder_ids``.
        name: of the row, for errors.

    Raises:
        ConfigError: a video or sound; placeholders without pixels; or an image token where there may be none.
    """
    images = {key: value for key, value in fields.items() if key in MULTIMODAL_FIELDS}
    if foreign := sorted(key for key in fields if "video" in key or "audio" in key or key == "input_features"):
        raise ConfigError(f"{name} has the field {foreign[0]!r}; only images are scored, no video and no sound.")
    for part, ids in (("the text-only prompt", text_prompt_ids), ("the response", response)):
        if found := set(ids.tolist()) & set(placeholders):
            advice = "Forbid it in sampling." if ids is response else "Render it without its images."
            raise ConfigError(f"{name}: {part} contains the image token {min(found)}, expected none. {advice}")
    ids = prompt_ids.cpu()
    if "pixel_values" not in images and set(ids.tolist()) & set(placeholders):
        raise ConfigError(f"{name}: the prompt contains image tokens, but the host sent no pixels for them.")
    # The host's fields per token may be padded, or go on behind the prompt.
    kinds = {key: images[key][..., : len(ids)].reshape(-1) for key in images.keys() & set(PER_TOKEN_FIELDS)}
    return PromptGroup(ids, text_prompt_ids.cpu(), (response.cpu(),), images | kinds)


def words_alone(messages: Sequence[Mapping[str, Any]], place: str) -> list[dict[str, Any]]:
    """A host's chat messages without their evidence: pictures, videos, sounds and marked parts.

    Args:
        messages: whose ``content`` is a string, content parts, or token ids, which stay.
        place: what stands for a picture in a text.

    Raises:
        ConfigError: a marked part of a tool's, whose parts the host writes as JSON; or a mark that means nothing.
    """

    def words(message: Mapping[str, Any]) -> Any:
        content = message.get("content")
        if isinstance(content, str):
            return content.replace(place, "")
        if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
            return content
        if message["role"].startswith("tool"):
            if has_evidence([message]):
                raise ConfigError(
                    "A part of a tool's message is marked as evidence; the host takes it as a text alone."
                )
            return content
        parts = [part for part in content if not is_evidence(part) and part["type"] == "text"]
        return [{**part, "text": part["text"].replace(place, "")} for part in parts]

    with config_errors("messages", ValueError):
        return [{**message, "content": words(message)} for message in messages]


def with_token_types(model: nn.Module, row: PromptGroup) -> PromptGroup:
    """The row with ``mm_token_type_ids`` (1 at image tokens) where the model asks for them and the host left them out.

    Args:
        model: unwrapped (possibly PEFT).
        row: of ``host_row``.
    """
    asked = "mm_token_type_ids" in inspect.signature(backbone(model).forward).parameters
    if not row.has_images or not asked or "mm_token_type_ids" in row.images:
        return row
    kinds = (row.prompt_ids == model.config.image_token_id).long()
    return PromptGroup(row.prompt_ids, row.text_prompt_ids, row.responses, {**row.images, "mm_token_type_ids": kinds})


def _same_prompt(one: PromptGroup, other: PromptGroup) -> bool:
    """Whether two rows have the same prompt, in both views, and the same pixels, bit by bit."""
    if one.images.keys() != other.images.keys():
        return False
    pairs = [(one.prompt_ids, other.prompt_ids), (one.text_prompt_ids, other.text_prompt_ids)]
    pairs += [(value, other.images[name]) for name, value in one.images.items()]
    return all(x is y or torch.equal(x, y) for x, y in pairs)


def merge_rows(rows: Sequence[PromptGroup], names: Sequence[Hashable]) -> tuple[list[PromptGroup], list[int]]:
    """Rows as groups that share a prompt.

    Args:
        rows: groups of one response each.
        names: of every row the name of its prompt, such as verl's ``uid``. Rows of one name whose prompts or pixels
            differ all the same (agents that went other ways) stay apart.

    Returns:
        The groups, and the numbers of the rows in the order in which the groups hold their responses.
    """
    members: list[list[int]] = []
    known: dict[Hashable, list[int]] = {}
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        places = known.setdefault(name, [])
        place = next((x for x in places if _same_prompt(rows[members[x][0]], row)), None)
        if place is None:
            places.append(len(members))
            members.append([number])
        else:
            members[place].append(number)
    groups = [
        PromptGroup(
            rows[numbers[0]].prompt_ids,
            rows[numbers[0]].text_prompt_ids,
            tuple(rows[number].responses[0] for number in numbers),
            rows[numbers[0]].images,
        )
        for numbers in members
    ]
    return groups, [number for numbers in members for number in numbers]
