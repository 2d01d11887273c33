"""From prompts, images and responses to the two views every token is scored in: with the image, and without it.

The text-only view is the same conversation rendered again *without* its image items. Cutting the image span out of the
token ids instead can tokenise differently where text touches the span, and keeping the placeholders without pixels runs
silently and changes every hidden state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from trl.data_utils import prepare_multimodal_messages

# Fields with one value per token; every other multimodal field belongs to the images and exists in one view only.
PER_TOKEN_FIELDS = ("mm_token_type_ids", "token_type_ids")
MULTIMODAL_FIELDS = (
    *PER_TOKEN_FIELDS,
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)


class PairedViews(NamedTuple):
    """B responses in both views, one row each; every row ends in the same C response columns.

    Attributes:
        input_ids: [2B, L] int64, the multimodal view in rows 0..B-1, the text-only view in rows B..2B-1. Prompts are
            padded on the left, responses on the right.
        attention_mask: [2B, L] int64.
        response_mask: [B, C] bool, the response tokens; N of them are set.
        multimodal: the images' fields (multimodal view only) and per-token fields [2B, L], zero in the text-only rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    multimodal: dict[str, Tensor]

    @property
    def trajectory_ids(self) -> Tensor:
        """[N] int64: the response (0..B-1) that each compacted token belongs to."""
        return self.response_mask.nonzero()[:, 0]

    @property
    def response_ids(self) -> Tensor:
        """[N] int64: the response tokens, in the order of the compacted hidden states."""
        batch, columns = self.response_mask.shape
        return self.input_ids[:batch, -columns:][self.response_mask]

    def multimodal_view(self) -> PairedViews:
        """The first B rows alone."""
        batch = len(self.response_mask)
        fields = {k: v[:batch] if k in PER_TOKEN_FIELDS else v for k, v in self.multimodal.items()}
        return PairedViews(self.input_ids[:batch], self.attention_mask[:batch], self.response_mask, fields)

    def text_view(self) -> PairedViews:
        """The last B rows alone, without columns that are padding in all of them."""
        batch = len(self.response_mask)
        mask = self.attention_mask[batch:]
        start = int(mask.any(dim=0).int().argmax())
        return PairedViews(self.input_ids[batch:, start:], mask[:, start:], self.response_mask, {})


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


def placeholder_ids(config: Any) -> list[int]:
    """Ids of the image, video and vision start/end tokens that a model's config declares, sorted."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})


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


def pair_views(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    text_prompt_ids: Tensor,
    text_prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    multimodal: dict[str, Tensor],
    *,
    forbidden: Sequence[int] = (),
    pad_token_id: int = 0,
) -> PairedViews:
    """Batch both views of B responses so that all responses occupy the same columns.

    Args:
        prompt_ids, prompt_mask: [B, P] int64, prompts with image placeholders, padded on the left.
        text_prompt_ids, text_prompt_mask: [B, Q] int64, the same prompts rendered without images, padded on the left.
        completion_ids, completion_mask: [B, C] int64, the responses, padded on the right.
        multimodal: the processor's image fields; per-token fields cover prompt and response, [B, P + C].
        forbidden: placeholder ids that the text-only view must not contain; empty where ``text_only_prompts`` has
            looked already, for looking synchronises a GPU.
        pad_token_id: fills new padding columns.

    Raises:
        ValueError: the two views have different numbers of rows, a shape does not fit, a prompt is not padded on the
            left, or a text-only prompt still contains a placeholder.
    """
    batch, columns = completion_ids.shape
    for name, ids, mask in (
        ("prompt_ids", prompt_ids, prompt_mask),
        ("text_prompt_ids", text_prompt_ids, text_prompt_mask),
        ("completion_ids", completion_ids, completion_mask),
    ):
        if ids.shape != mask.shape or len(ids) != batch:
            raise ValueError(
                f"The two views disagree: {name} has shape {tuple(ids.shape)} and its mask {tuple(mask.shape)}, "
                f"expected {batch} rows (one per response) and equal shapes."
            )
        if ids.shape[1] and name != "completion_ids" and not bool(mask[:, -1].all()):
            raise ValueError(f"{name} must be padded on the left: its last column holds padding.")
    if forbidden:
        forbidden_ids = torch.tensor(list(forbidden), device=text_prompt_ids.device, dtype=text_prompt_ids.dtype)
        leftover = torch.isin(text_prompt_ids, forbidden_ids) & text_prompt_mask.bool()
        if bool(leftover.any()):
            row = int(leftover.any(dim=1).int().argmax())
            raise ValueError(
                f"Row {row} of text_prompt_ids still contains an image placeholder; render the text-only view without "
                "the image item."
            )
    width = max(prompt_ids.shape[1], text_prompt_ids.shape[1])

    def stack(view: Tensor, text: Tensor, tail: Tensor, value: int) -> Tensor:
        prompts = torch.cat([pad(x, (width - x.shape[1], 0), value=value) for x in (view, text)])
        return torch.cat([prompts, tail.repeat(2, 1)], dim=1)

    fields = dict(multimodal)
    for name in PER_TOKEN_FIELDS:
        if name not in fields:
            continue
        expected = (batch, prompt_ids.shape[1] + columns)
        if tuple(fields[name].shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(fields[name].shape)}.")
        padded = pad(fields[name], (width - prompt_ids.shape[1], 0))
        fields[name] = torch.cat([padded, torch.zeros_like(padded)])
    return PairedViews(
        stack(prompt_ids, text_prompt_ids, completion_ids, pad_token_id),
        stack(prompt_mask, text_prompt_mask, completion_mask, 0),
        completion_mask.bool(),
        fields,
    )


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
        conversation=[prepare_multimodal_messages(x["prompt"], images=list(x.get("images") or [])) for x in samples],
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


def encode_views(
    processor: Any,
    samples: Sequence[dict[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    forbidden: Sequence[int],
    device: torch.device | str = "cpu",
    **template_options: Any,
) -> PairedViews:
    """Both views of given responses to samples in the shared format (``prompt``, ``images``).

    Args:
        processor, samples, template_options: as in ``encode_prompts``.
        completion_ids: one list of token ids per sample.
        forbidden: placeholder ids, see ``placeholder_ids``.
        device: where the tensors go.

    Raises:
        ValueError: different numbers of samples and responses, or an image placeholder in a text-only view.
    """
    if len(samples) != len(completion_ids):
        raise ValueError(f"completion_ids holds {len(completion_ids)} responses for {len(samples)} samples.")
    pad_id = processor.tokenizer.pad_token_id
    prompt_ids, prompt_mask, fields = encode_prompts(processor, samples, **template_options)
    text = text_only_prompts(processor, [x["prompt"] for x in samples], forbidden, **template_options)
    columns = max(map(len, completion_ids))
    tail = torch.tensor([[*ids, *[pad_id] * (columns - len(ids))] for ids in completion_ids], dtype=torch.int64)
    tail_mask = (torch.arange(columns) < torch.tensor([[len(ids)] for ids in completion_ids])).long()
    fields = {name: pad(x, (0, columns)) if name in PER_TOKEN_FIELDS else x for name, x in fields.items()}
    return pair_views(
        *[x.to(device) for x in (prompt_ids, prompt_mask, *left_pad(text, pad_id), tail, tail_mask)],
        {name: value.to(device) for name, value in fields.items()},
        pad_token_id=pad_id,
    )
