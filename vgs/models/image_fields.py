"""The image fields of prompts, and how those of several prompts become those of one packed row or batch.

A field is joined along its first dimension, whatever this counts (images, tiles or patches), unless ``RULES`` or the
layout of the pixels say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .groups import PER_TOKEN_FIELDS


class Rule(NamedTuple):
    """How the fields of one name are joined.

    Attributes:
        fill: whether they are filled up with zeros to the largest, where other fields say how much of it is image.
        shift: whether their values count patches of ``pixel_values``, from the prompt's first one on; -1 is none.
        optional: whether a prompt with images may lack it, which is then joined as nothing.
    """

    fill: bool = False
    shift: bool = False
    optional: bool = False


#: Fields that are known to be joined right. Others need a rule of their own.
RULES = {
    "pixel_values": Rule(fill=True),
    "pixel_attention_mask": Rule(fill=True),
    "pixel_mask": Rule(),
    "high_res_pixel_values": Rule(),
    "pixel_values_local": Rule(optional=True),
    "num_local_patches": Rule(),
    "image_grid_thw": Rule(),
    "image_grid_hw": Rule(),
    "image_grids": Rule(),
    "image_merge_sizes": Rule(),
    "image_num_crops": Rule(),
    "image_position_ids": Rule(),
    "image_sizes": Rule(),
    "image_token_pooling": Rule(shift=True),
    "batch_num_images": Rule(),
    "spatial_shapes": Rule(),
    "target_sizes": Rule(),
}
IMAGE_FIELDS = tuple(RULES)
MULTIMODAL_FIELDS = (*PER_TOKEN_FIELDS, *IMAGE_FIELDS)


def is_pixels(name: str) -> bool:
    """Whether a field holds pixels, or says which of them are image."""
    return "pixel" in name


def _dimension(name: str, fields: Mapping[str, Tensor]) -> int:
    """The dimension along which a field is joined."""
    if name not in ("pixel_values", "pixel_attention_mask"):
        return 0
    if "target_sizes" in fields:
        return 3  # [1, C, H, patches of all images]: MiniCPM
    # Five dimensions are [prompts, images, C, H, W] (Idefics), with ``image_sizes`` [images, tiles, C, H, W], with
    # channels last [patches, T, H, W, C] (Inkling).
    shape = fields["pixel_values"].shape
    return int(len(shape) == 5 and shape[2] < shape[4] and "image_sizes" not in fields)


def _check_names(names: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(MULTIMODAL_FIELDS)):
        raise ValueError(f"images has the field {unknown[0]!r}; expected some of {', '.join(MULTIMODAL_FIELDS)}.")


def _pad_to(value: Tensor, shape: Sequence[int]) -> Tensor:
    """``value`` filled up with zeros at the end of every dimension."""
    return pad(value, [x for size, old in zip(shape[::-1], value.shape[::-1], strict=True) for x in (0, size - old)])


def _shifted(name: str, parts: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Indices into the patches of each prompt as indices into those of all."""
    shifted, before = [], 0
    for fields in parts:
        value = fields[name]
        shifted.append(torch.where(value >= 0, value + before, value))
        before += fields["pixel_values"].shape[:-1].numel()
    return shifted


def join_images(images: Sequence[Mapping[str, Tensor]], *, pixels: bool = True) -> dict[str, Tensor]:
    """The image fields of several prompts as those of one row (or batch) that holds the prompts in this order.

    Args:
        images: one dict per prompt (``PromptGroup.images``); empty for a prompt without images. Per-token fields are
            left out of the result, for they follow the row's tokens.
        pixels: with False the fields that hold pixels are left out, too.

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
    for name, rule in RULES.items():
        having = [fields for fields in parts if name in fields]
        if not having or (is_pixels(name) and not pixels):
            continue
        if len(having) != len(parts) and not rule.optional:
            raise ValueError(
                f"{len(having)} of {len(parts)} prompts with images have the field {name!r}; expected all."
            )
        values = _shifted(name, having) if rule.shift else [fields[name] for fields in having]
        dim = _dimension(name, parts[0])
        if rule.fill and parts[0].keys() & {"image_sizes", "pixel_attention_mask"}:
            largest = [max(sizes) for sizes in zip(*[value.shape for value in values], strict=True)]
            values = [_pad_to(x, [*largest[:dim], x.shape[dim], *largest[dim + 1 :]]) for x in values]
        shapes = {(*value.shape[:dim], *value.shape[dim + 1 :]) for value in values}
        if len(shapes) > 1:
            found = ", ".join(str(tuple(value.shape)) for value in values)
            raise ValueError(f"The prompts' {name} have shapes {found}; expected equal ones but for dimension {dim}.")
        joined[name] = torch.cat(values, dim=dim)
    return joined
