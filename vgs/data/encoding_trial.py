"""A trial, not to be merged: every prompt encoded alone with the processor's own tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..models.groups import PER_TOKEN_FIELDS, PromptGroup
from .prompts import remove_images

#: How the fields of several prompts become those of one row or batch.
#: "first": one behind the other along the first dimension (images, tiles, patches or prompts).
#: "row": the first dimension is the prompt; its images follow along the second.
JOIN = {
    "pixel_values": "first",  # "row" where it has five dimensions and no ``image_sizes`` (Idefics, SmolVLM)
    "pixel_attention_mask": "first",  # as ``pixel_values``
    "image_grid_thw": "first",
    "image_sizes": "first",
    "image_position_ids": "first",
    "spatial_shapes": "first",
    "batch_num_images": "first",
}
#: Returned by some processors for their own use.
UNUSED = frozenset({"attention_mask", "num_crops", "num_patches", "rows", "cols", "text_replacement_offsets"})


def as_tensor(value: Any) -> Tensor:
    """Tensors, arrays, numbers, and lists of them, however deep; tensors of one shape are stacked."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple, Tensor, np.ndarray)):
        return torch.stack([as_tensor(part) for part in value])
    return torch.as_tensor(np.asarray(value))


def with_images(messages: Sequence[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    from trl.data_utils import prepare_multimodal_messages

    return prepare_multimodal_messages(list(messages), images=list(images))


def placeholder_strings(processor: Any, forbidden: Sequence[int]) -> list[str]:
    """Tokens that processor or model read as the place of a picture; whole tokens only, no ordinary words."""
    tokenizer = processor.tokenizer
    added = tokenizer.get_added_vocab()
    ids = {*forbidden, *(index for index in getattr(processor, "image_token_ids", []) if index is not None)}
    names = {token for token, index in added.items() if index in ids}
    names |= {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")} & added.keys()
    return sorted(names)


def check_text(messages: Sequence[dict[str, Any]], marks: Sequence[str], index: int) -> None:
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            if part["type"] == "text" and (found := [mark for mark in marks if mark in part["text"]]):
                raise ValueError(
                    f"prompt {index} has the image placeholder {', '.join(found)} in its text; "
                    "put images in the sample's `images`, and no placeholder in the prompt's text."
                )


def encode_prompt(
    processor: Any, messages: Sequence[dict[str, Any]], **template_options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """[P] int64 ids of one conversation, unpadded, and its multimodal fields (per-token ones [P])."""
    encoded = processor.apply_chat_template(
        list(messages),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": False},
        **template_options,
    )
    ids = as_tensor(encoded["input_ids"])[0]
    fields = {}
    for name, value in encoded.items():
        if name in PER_TOKEN_FIELDS:
            fields[name] = as_tensor(value)[0]
        elif name in JOIN:
            fields[name] = as_tensor(value)
        elif name not in UNUSED and name != "input_ids":
            kind = type(processor).__name__
            raise ValueError(f"{kind} returns the field {name!r}, which this version cannot join over prompts.")
    return ids, fields


def encode_groups(
    processor: Any,
    samples: Sequence[dict[str, Any]],
    responses: Sequence[Sequence[Sequence[int]]],
    forbidden: Sequence[int],
    device: torch.device | str = "cpu",
    **template_options: Any,
) -> list[PromptGroup]:
    """As ``vgs.data.prompts.encode_groups``."""
    if len(samples) != len(responses):
        raise ValueError(f"responses holds entries for {len(responses)} samples, expected {len(samples)}.")
    marks = placeholder_strings(processor, forbidden)
    groups = []
    for index, (sample, answers) in enumerate(zip(samples, responses, strict=True)):
        check_text(sample["prompt"], marks, index)
        text_ids, _ = encode_prompt(processor, remove_images(sample["prompt"]), **template_options)
        if found := set(text_ids.tolist()) & set(forbidden):  # written by the chat template itself
            names = processor.tokenizer.convert_ids_to_tokens(sorted(found))
            raise ValueError(f"The text-only view of prompt {index} contains the placeholder {', '.join(names)}.")
        ids, fields = encode_prompt(
            processor, with_images(sample["prompt"], sample.get("images") or []), **template_options
        )
        fields = {name: value if name in PER_TOKEN_FIELDS else value.to(device) for name, value in fields.items()}
        tensors = tuple(torch.tensor(list(part), dtype=torch.int64) for part in answers)
        groups.append(PromptGroup(ids, text_ids, tensors, fields))
    return groups


class PromptLengths:
    """Tokens of prompts, exact for every family, from the sizes of their pictures: no file is decoded.

    What a picture becomes in the prompt (start, tiles, line breaks, end) is asked of the processor itself, with blank
    pictures, once for all prompts whose pictures have these sizes; the expanded text is then tokenised.
    """

    def __init__(self, processor: Any, **template_options: Any) -> None:
        self.processor, self.options = processor, template_options
        self._expanded: dict[tuple[tuple[int, int], ...], list[tuple[str, str, int]]] = {}
        marks = "|".join(map(re.escape, placeholder_strings(processor, [])))
        self._runs = re.compile(rf"({marks})\1+")  # a run of one whole token: its first stands for all

    def __call__(self, messages: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]]) -> int:
        """Tokens of a conversation with pictures of these sizes (width, height)."""
        from PIL import Image

        tokenizer, key = self.processor.tokenizer, tuple(sizes)
        marked = with_images(messages, [Image.new("L", (1, 1))] * len(key))  # of no account without tokenising
        text = self.processor.apply_chat_template(marked, add_generation_prompt=True, **self.options)
        if key and key not in self._expanded:
            blank = with_images(messages, [Image.new("RGB", size) for size in key])
            encoded = self.processor.apply_chat_template(
                blank,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"padding": False, "return_text_replacement_offsets": True},
                **self.options,
            )
            found = encoded["text_replacement_offsets"][0]
            self._expanded[key] = [(x["text"], *self._shortened(x["replacement"])) for x in found]
        pieces, rest, left_out = [], text, 0
        for mark, expansion, count in self._expanded.get(key, ()):
            before, _, rest = rest.partition(mark)
            pieces += [before, expansion]
            left_out += count
        # As the processor: no second beginning-of-sequence token where the template writes one.
        add = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        return left_out + len(tokenizer("".join([*pieces, rest]), add_special_tokens=add)["input_ids"])

    def _shortened(self, expansion: str) -> tuple[str, int]:
        """The expansion without repetitions, and the number of tokens left out."""
        left_out = sum(len(run.group()) // len(run.group(1)) - 1 for run in self._runs.finditer(expansion))
        return self._runs.sub(r"\1", expansion), left_out


def prompt_length(processor: Any, sample: dict[str, Any], **template_options: Any) -> int:
    return PromptLengths(processor, **template_options)(sample["prompt"], [image.size for image in sample["images"]])


def _fill(value: Tensor, shape: Sequence[int]) -> Tensor:
    return pad(value, [x for size, old in zip(shape[::-1], value.shape[::-1], strict=True) for x in (0, size - old)])


def join_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As ``vgs.models.image_fields.join_images``, with the rules above."""
    parts = [fields for fields in images if "pixel_values" in fields]
    joined = {}
    for name in JOIN:
        values = [fields[name] for fields in parts if name in fields]
        if not values:
            continue
        by_row = parts[0]["pixel_values"].ndim == 5 and "image_sizes" not in parts[0]
        dim = int(by_row and name in ("pixel_values", "pixel_attention_mask"))
        if name in ("pixel_values", "pixel_attention_mask") and parts[0].keys() & {
            "image_sizes",
            "pixel_attention_mask",
        }:
            largest = [max(sizes) for sizes in zip(*[value.shape for value in values], strict=True)]
            values = [_fill(x, [*largest[:dim], x.shape[dim], *largest[dim + 1 :]]) for x in values]
        joined[name] = torch.cat(values, dim=dim)
    return joined
