"""The image fields of prompts, and how those of several prompts become those of one packed row or batch.

Every field is joined along its first dimension, whatever this counts (images, tiles or patches), but pixels that come
as [prompts, images, C, H, W], which are joined along their images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .groups import PER_TOKEN_FIELDS

#: Fields that are known to be joined right. Others need a rule of their own: an offset per image, another dimension.
IMAGE_FIELDS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_attention_mask",
    "spatial_shapes",
    "image_sizes",
    "image_position_ids",
    "batch_num_images",
)
MULTIMODAL_FIELDS = (*PER_TOKEN_FIELDS, *IMAGE_FIELDS)
#: Pixels, and the field that says where they are: both are filled up with zeros to the largest picture.
PIXEL_FIELDS = ("pixel_values", "pixel_attention_mask")


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
        The joined fields, on the device of their parts; empty without any image. Where ``image_sizes`` or
        ``pixel_attention_mask`` say how much of it is image, ``pixel_values`` is filled up with zeros to the largest
        size.

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
        dim = int(name in PIXEL_FIELDS and _by_prompt(parts[0]))
        if name in PIXEL_FIELDS and parts[0].keys() & {"image_sizes", "pixel_attention_mask"}:
            largest = [max(sizes) for sizes in zip(*[value.shape for value in values], strict=True)]
            values = [_pad_to(x, [*largest[:dim], x.shape[dim], *largest[dim + 1 :]]) for x in values]
        shapes = {(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}
        if len(shapes) > 1:
            found = ", ".join(str(tuple(value.shape)) for value in values)
            raise ValueError(f"The prompts' {name} have shapes {found}; expected equal ones but for dimension {dim}.")
        joined[name] = torch.cat(values, dim=dim)
    return joined
