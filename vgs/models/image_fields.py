"""The image fields of prompts: joined for one packed row, and taken apart from a host's batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from .groups import PER_TOKEN_FIELDS

MULTIMODAL_FIELDS = (
    *PER_TOKEN_FIELDS,
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
)
IMAGE_FIELDS = tuple(name for name in MULTIMODAL_FIELDS if name not in PER_TOKEN_FIELDS)


def _by_prompt(fields: Mapping[str, Tensor]) -> bool:
    """Whether pixels come as [prompts, images, C, H, W] (SmolVLM, Idefics); elsewhere images or patches come first.

    Five dimensions with ``image_sizes`` are [images, tiles, C, H, W] (LLaVA-NeXT).
    """
    return fields["pixel_values"].ndim == 5 and "image_sizes" not in fields


def _check_names(names: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(MULTIMODAL_FIELDS)):
        raise ValueError(f"images has the field {unknown[0]!r}; expected some of {', '.join(MULTIMODAL_FIELDS)}.")


def _pad_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """``value`` filled up with zeros at the end of every dimension."""
    return pad(value, [x for size, old in zip(shape[::-1], value.shape[::-1], strict=True) for x in (0, size - old)])


def join_images(images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The image fields of several prompts as those of one row (or batch) that holds the prompts in this order.

    Args:
        images: one dict per prompt (``PromptGroup.images``); empty for a prompt without images. Per-token fields are
            left out of the result, for they follow the row's tokens.

    Returns:
        The joined fields, on the device of their parts; empty without any image. Where ``image_sizes`` say how much
        of it is image, ``pixel_values`` is filled up with zeros to the largest size.

    Raises:
        ValueError: an unknown field, prompts with different fields, or sizes that cannot be joined.
    """
    for fields in images:
        _check_names(fields)
    parts = [fields for fields in images if "pixel_values" in fields]
    joined = {}
    for name in IMAGE_FIELDS:
        values = [fields[name] for fields in parts if name in fields]
        if not values:
            continue
        if len(values) != len(parts):
            raise ValueError(
                f"{len(values)} of {len(parts)} prompts with images have the field {name!r}; expected all."
            )
        dim = int(name in ("pixel_values", "pixel_attention_mask") and _by_prompt(parts[0]))
        if name == "pixel_values" and "image_sizes" in parts[0]:
            largest = [max(sizes) for sizes in zip(*[value.shape for value in values], strict=True)]
            values = [_pad_to(value, [len(value), *largest[1:]]) for value in values]
        shapes = {(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}
        if len(shapes) > 1:
            found = ", ".join(str(tuple(value.shape)) for value in values)
            raise ValueError(f"The prompts' {name} have shapes {found}; expected equal ones but for dimension {dim}.")
        joined[name] = torch.cat(values, dim=dim)
    return joined


def split_images(
    batch: Mapping[str, Tensor],
    prompt_mask: Tensor,
    num_images: Sequence[int] | None = None,
    num_tiles: Sequence[int] | None = None,
) -> list[dict[str, Tensor]]:
    """The image fields of each prompt of a batch as TRL prepares it; the inverse of ``join_images``.

    Args:
        batch: the batch's multimodal fields; other keys are ignored. Per-token fields are [B, P + C].
        prompt_mask: [B, P], prompts padded on the left.
        num_images: images of each prompt; None where the batch has none.
        num_tiles: rows of ``pixel_values`` of each prompt, where images are cut into tiles (InternVL).

    Returns:
        B dicts. Pixels stay on their device; per-token fields [P_i] and ``image_grid_thw`` come to the CPU.

    Raises:
        ValueError: the counts do not fit the fields.
    """
    count, width = prompt_mask.shape
    split: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name in PER_TOKEN_FIELDS:
        if name in batch:
            values = batch[name][:, :width].cpu()
            for fields, value, mask in zip(split, values, prompt_mask.cpu().bool(), strict=True):
                fields[name] = value[mask]
    if "pixel_values" not in batch:
        return split
    if num_images is None or len(num_images) != count:
        raise ValueError(f"num_images is {num_images} for {count} prompts with pixel_values; expected one count each.")
    values = {name: batch[name] for name in IMAGE_FIELDS if name in batch}
    counts = dict.fromkeys(values, num_images if num_tiles is None else num_tiles)
    if "image_grid_thw" in values:
        values["image_grid_thw"] = values["image_grid_thw"].cpu()
        patches = iter(values["image_grid_thw"].prod(dim=-1).tolist())
        counts["image_grid_thw"] = num_images
        counts["pixel_values"] = [sum(islice(patches, images)) for images in num_images]
    elif _by_prompt(values):
        counts = dict.fromkeys(values, [1] * count)
    for name, value in values.items():
        if sum(counts[name]) != len(value):
            raise ValueError(f"{name} has {len(value)} rows, but the prompts' images make {sum(counts[name])}.")
        for fields, part, images in zip(split, value.split(list(counts[name])), num_images, strict=True):
            if images:
                fields[name] = part
    return split
