"""Where a token stands in its sequence: the rotary positions of one prompt, as its own model counts them.

A packed row holds many sequences, so no model can infer positions from it; they are computed per prompt, on the CPU.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .families import backbone
from .groups import PER_TOKEN_FIELDS, PromptGroup


def prompt_positions(model: nn.Module, prompt_ids: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """Rotary positions of one prompt, as the model would compute them for this prompt alone.

    Families with several positions for a token (time, height and width, say) have a method ``get_rope_index``, which is
    asked; elsewhere tokens are counted. A response counts on, on every axis, from the largest position.

    Args:
        model: an unwrapped (possibly PEFT) model, on any device.
        prompt_ids: [P] int64 on the CPU, image placeholders expanded; the text-only prompt for the text-only view.
        images: the prompt's image fields; only those that say where and how large the images are matter (grids, types
            of tokens), best kept on the CPU. Empty for text.

    Returns:
        [R, P] on the CPU, whole numbers; R is the number of the family's axes, 1 where it has one position per token.

    Raises:
        ValueError: the prompt does not have as many placeholders as its images make tokens.
    """
    inner = backbone(model)
    if not hasattr(inner, "get_rope_index"):
        return torch.arange(len(prompt_ids))[None]
    wanted = _rope_arguments(type(inner))
    sizes = {name: images[name].cpu() for name in images if name in wanted and name not in PER_TOKEN_FIELDS}
    placeholders = prompt_ids == inner.config.image_token_id if sizes else torch.zeros_like(prompt_ids)
    if "image_grid_thw" in sizes:
        _check_alignment(inner, placeholders, sizes["image_grid_thw"])
    kinds = images.get("mm_token_type_ids", placeholders).cpu()
    return _rope_index(inner, prompt_ids, kinds, sizes)


@functools.cache
def _rope_arguments(body: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(body.get_rope_index).parameters)


def _rope_index(inner: nn.Module, ids: Tensor, kinds: Tensor, sizes: Mapping[str, Tensor]) -> Tensor:
    """[R, P] of ids [P] whose types are ``kinds``, by the body's own method with those arguments that it has."""
    known = {"attention_mask": torch.ones_like(ids)[None], "mm_token_type_ids": kinds[None].int(), **sizes}
    wanted = _rope_arguments(type(inner))
    return inner.get_rope_index(ids[None], **{name: known[name] for name in known if name in wanted})[0][:, 0]


def _check_alignment(inner: nn.Module, placeholders: Tensor, grids: Tensor) -> None:
    """Compare placeholders with grids, if a token stands for a square of patches: others have a check of their own."""
    side = getattr(inner.config.vision_config, "spatial_merge_size", 1)
    sizes, found = grids.prod(dim=-1) // side**2, int(placeholders.sum())
    if int(sizes.sum()) == found:
        return
    picture = torch.full((int(sizes[0]),), inner.config.image_token_id)
    try:
        _rope_index(inner, picture, torch.ones_like(picture), {"image_grid_thw": grids[:1]})
    except (RuntimeError, ValueError):  # HunYuan has a token more for every row
        return
    raise ValueError(
        f"prompt_ids has {found} image placeholders, but its images of grids {grids.tolist()} make "
        f"{int(sizes.sum())} tokens: prompt and images have lost their alignment."
    )


def check_rotary_lengths(model: nn.Module, groups: Sequence[PromptGroup], text: bool) -> None:
    """Stop where sequences would change each other's rotary frequencies.

    For two rope types the library chooses them by the largest position in a batch: beyond a length, shorter sequences
    would get what the longest one asks for.

    Args:
        model: an unwrapped (possibly PEFT) model.
        groups: of one batch.
        text: whether the text-only view is in it, too.

    Raises:
        ConfigError: such sequences; the length.
    """
    config = backbone(model).config.get_text_config()
    limits = _rotary_limits(config, getattr(config, "rope_parameters", None) or {})
    if not limits:
        return
    lengths = {len(group.prompt_ids) + length for group in groups for length in group.response_lengths}
    if text:
        lengths |= {len(group.text_prompt_ids) + length for group in groups for length in group.response_lengths}
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    for kind, limit in limits.items():
        if longest > limit and shortest < (longest if kind == "dynamic" else limit + 1):
            raise ConfigError(
                f'rope_type "{kind}" of the {type(model).__name__} gives all sequences of a batch the frequencies of '
                f"the longest, here one of {longest} tokens beside one of {shortest}: keep prompt and response within "
                f"{limit} tokens (max_prompt_length, max_completion_length)."
            )


def _rotary_limits(config: Any, rope: Mapping[str, Any]) -> dict[str, int]:
    """Rope types that look at the whole batch, and the length from which on they do."""
    limits = {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
        if part.get("rope_type") == "longrope":
            limits["longrope"] = part["original_max_position_embeddings"]
        elif part.get("rope_type") == "dynamic":
            limits["dynamic"] = config.max_position_embeddings
    return limits
