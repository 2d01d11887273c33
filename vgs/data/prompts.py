"""From prompts, images and responses to the two views every token is scored in: with the image, and without it.

The text-only view is the same conversation rendered again *without* its image items. Cutting the image span out of the
token ids instead can tokenise differently where text touches the span, and keeping the placeholders without pixels runs
silently and changes every hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..models.groups import PER_TOKEN_FIELDS, PromptGroup
from ..models.image_fields import MULTIMODAL_FIELDS

ROLES = ("system", "user", "assistant", "tool")
ANCHOR_SIDE = 64  # pixels: a few tokens in every family


def remove_images(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as content blocks, without its image (and video) items.

    Args:
        messages: chat messages whose ``content`` is a string or a list of content blocks.
    """
    stripped = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        stripped.append({**message, "content": [part for part in content if part["type"] not in ("image", "video")]})
    return stripped


def fill_images(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    """The conversation as content blocks, with its images in their places.

    Args:
        messages: chat messages whose ``content`` is a string or a list of content blocks. Image blocks without an image
            are places. Where the first user message is a string, all images come before its text.
        images: as many as there are places.

    Raises:
        ValueError: another number of images, or a role that is none of system, user, assistant, tool.
    """
    filled, opened = [], False
    for message in messages:
        role, content = message["role"], message.get("content")
        if role not in ROLES:
            raise ValueError(f"A message has the role {role!r}; expected one of {', '.join(ROLES)}.")
        if isinstance(content, str):
            places = [{"type": "image"} for _ in images] if role == "user" and not opened else []
            opened = opened or role == "user"
            content = [*places, {"type": "text", "text": content}]
            message = {**message, "content": content}
        filled.append(message)

    def is_place(message: dict[str, Any], part: dict[str, Any]) -> bool:
        return message["role"] != "tool" and part["type"] == "image" and "image" not in part

    count = sum(is_place(message, part) for message in filled for part in message.get("content") or ())
    if count != len(images):
        raise ValueError(f"images has {len(images)} entries, but the prompt has places for {count}.")
    rest = iter(images)
    return [
        {**x, "content": [{**part, "image": next(rest)} if is_place(x, part) else part for part in x["content"]]}
        if x.get("content")
        else x
        for x in filled
    ]


def text_only_prompts(
    processor: Any, prompts: Sequence[Sequence[dict[str, Any]]], forbidden: Sequence[int], **template_options: Any
) -> list[list[int]]:
    """Token ids of each prompt rendered without its images.

    Args:
        processor: the model's processor (its chat template renders the prompts).
        prompts: conversations, with or without image items.
        forbidden: placeholder ids (``placeholder_ids``) that a text-only prompt must not contain.
        **template_options: passed to ``apply_chat_template``.

    Raises:
        ValueError: a rendered prompt still contains an image placeholder.
    """
    rendered = processor.apply_chat_template(
        conversation=[remove_images(prompt) for prompt in prompts],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_options,
    )["input_ids"]
    for index, ids in enumerate(rendered):
        if found := set(ids) & set(forbidden):
            names = processor.tokenizer.convert_ids_to_tokens(sorted(found))
            raise ValueError(
                f"The text-only view of prompt {index} still contains the image placeholder {', '.join(names)}; "
                "put images in the sample's `images`, and no placeholder in the prompt's text."
            )
    return rendered


def left_pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Token id lists -> ([B, P] int64 padded on the left, [B, P] int64 mask)."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[value] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def encode_prompts(
    processor: Any, samples: Sequence[dict[str, Any]], **template_options: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Prompts with their images as a model takes them.

    Args:
        processor: the model's processor.
        samples: dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images, may be empty).
        **template_options: passed to ``apply_chat_template``.

    Returns:
        ids and mask, [B, P] int64 padded on the left, and the multimodal fields (per-token ones [B, P]).
    """
    encoded = processor.apply_chat_template(
        conversation=[fill_images(x["prompt"], list(x.get("images") or [])) for x in samples],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        **template_options,
    )
    ids, mask = left_pad(encoded["input_ids"], processor.tokenizer.pad_token_id)
    fields = {
        name: left_pad(encoded[name], 0)[0] if name in PER_TOKEN_FIELDS else torch.as_tensor(encoded[name])
        for name in MULTIMODAL_FIELDS
        if name in encoded
    }
    return ids, mask, fields


def encode_groups(
    processor: Any,
    samples: Sequence[dict[str, Any]],
    responses: Sequence[Sequence[Sequence[int]]],
    forbidden: Sequence[int],
    device: torch.device | str = "cpu",
    **template_options: Any,
) -> list[PromptGroup]:
    """Both views of samples in the shared format (``prompt``, ``images``) with given responses.

    Args:
        processor, template_options: as in ``encode_prompts``.
        samples: dicts with ``prompt`` and ``images``.
        responses: for every sample its responses, each a list of token ids.
        forbidden: placeholder ids, see ``placeholder_ids``.
        device: where the image fields go.

    Returns:
        One group per sample; its tensors are on the CPU, but for the image fields.

    Raises:
        TypeError: responses that are no lists of token ids.
        ValueError: different numbers of samples and responses, or an image placeholder in a text-only view or in a
            response.
    """
    if len(samples) != len(responses):
        raise ValueError(f"responses holds entries for {len(responses)} samples, expected {len(samples)}.")
    _check_responses(responses, forbidden)
    if not samples:
        return []
    text_prompts = text_only_prompts(processor, [x["prompt"] for x in samples], forbidden, **template_options)
    groups = []
    for sample, text_ids, answers in zip(samples, text_prompts, responses, strict=True):
        ids, _, fields = encode_prompts(processor, [sample], **template_options)
        images = {name: (x[0] if name in PER_TOKEN_FIELDS else x).to(device) for name, x in fields.items()}
        tensors = [torch.tensor(list(part), dtype=torch.int64) for part in (text_ids, *answers)]
        groups.append(PromptGroup(ids[0], tensors[0], tuple(tensors[1:]), images))
    return groups


def _check_responses(responses: Sequence[Any], forbidden: Sequence[int]) -> None:
    for index, answers in enumerate(responses):
        for number, ids in enumerate(answers):
            if not hasattr(ids, "__len__"):
                raise TypeError(
                    f"responses[{index}] must be a list of responses, each a list of token ids, got {ids!r} in it."
                )
            if found := {int(token) for token in ids} & set(forbidden):
                raise ValueError(
                    f"responses[{index}][{number}] contains the image or video token {min(found)}, which stands for "
                    "pixels. Forbid it in sampling (suppress_tokens, bad_words or logit_bias)."
                )


def anchor_group(
    processor: Any, forbidden: Sequence[int], device: torch.device | str = "cpu", **template_options: Any
) -> PromptGroup:
    """A prompt with a small image and one token to it, for ``vgs.models.forward.score_with_anchor``.

    Args:
        processor, forbidden, device, template_options: as of ``encode_groups``.

    Raises:
        ValueError: a chat template that puts an image placeholder into a text-only prompt.
    """
    side = (ANCHOR_SIDE, ANCHOR_SIDE)
    sample = {"prompt": [{"role": "user", "content": "."}], "images": [Image.new("RGB", side)]}
    response = [[processor.tokenizer.eos_token_id]]
    return encode_groups(processor, [sample], [response], forbidden, device, **template_options)[0]
