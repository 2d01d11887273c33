"""Degraded copies of images: what a model is shown in the control view of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..models.groups import PromptGroup
from .messages import shared_format
from .prompts import encode_groups

PIXELATION = 0.1  # of each side (VA-OPD, arXiv 2605.21924)


def _black(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    return Image.new("RGB", image.size)


def _pixelated(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    size = [max(1, round(PIXELATION * side)) for side in image.size]
    small = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
    return small.resize(image.size, Image.Resampling.NEAREST)


def _noise(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    values = generator.normal(127.5, 64, (image.height, image.width, 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


CONTROLS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "black": _black,
    "pixelated": _pixelated,
    "noise": _noise,
}


def control_images(images: Iterable[Image.Image], kind: str, seed: int = 0) -> list[Image.Image]:
    """RGB images of the same sizes, so that a processor makes as many tokens of them, that show (almost) nothing.

    Args:
        images: of any mode.
        kind: ``"black"``; ``"pixelated"``: down to a tenth of each side and back; ``"noise"``: Gaussian, mean 127.5,
            standard deviation 64, clipped to a byte.
        seed: of the noise; each image of a call has its own.

    Raises:
        ValueError: an unknown ``kind``.
    """
    if kind not in CONTROLS:
        raise ValueError(f"kind must be one of {', '.join(CONTROLS)}, got {kind!r}.")
    generator = np.random.default_rng(seed)
    return [CONTROLS[kind](image, generator) for image in images]


def control_groups(
    processor: Any,
    samples: Sequence[dict[str, Any]],
    groups: Sequence[PromptGroup],
    kind: str,
    seed: int = 0,
    **template_options: Any,
) -> list[PromptGroup]:
    """The groups with degraded images; those without images stay as they are.

    Args:
        processor, template_options: as in ``prompts.encode_prompt``.
        samples: ``prompt`` and ``images`` of each group.
        groups: prompts with their responses.
        kind, seed: see ``control_images``; all groups have the same noise.

    Raises:
        ValueError: a degraded image takes other tokens than the original.
    """
    controls = []
    for sample, group in zip(samples, groups, strict=True):
        if not group.has_images:
            controls.append(group)
            continue
        sample = shared_format(sample)
        degraded = {**sample, "images": control_images(sample["images"], kind, seed)}
        responses, device = [response.tolist() for response in group.responses], group.images["pixel_values"].device
        (control,) = encode_groups(processor, [degraded], [responses], (), device, **template_options)
        if not torch.equal(control.prompt_ids, group.prompt_ids):
            raise ValueError(
                f"The prompt with {kind} images has {len(control.prompt_ids)} tokens, expected the "
                f"{len(group.prompt_ids)} of the sampled one: samples must be those that the groups were made of."
            )
        controls.append(control)
    return controls
