"""Where a token stands in its sequence: the rotary positions of each family.

A packed row holds many sequences, so no model can infer positions from it; they are computed per prompt, on the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from .adapters import is_peft_model

#: Families with one position each for time, height and width (mRoPE).
MROPE = frozenset({"qwen2_5_vl", "qwen3_vl"})
#: Families whose packed rows equal separate passes, by ``config.model_type``.
VERIFIED = MROPE | {"gemma3", "internvl", "llava", "smolvlm"}
#: Text stacks under them: full or sliding attention, rotary positions, nothing carried from token to token.
VERIFIED_TEXT = frozenset({"gemma3_text", "llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text"})

#: Rotary embeddings whose frequencies do not depend on the longest sequence at hand, by ``rope_type``.
FIXED_ROPE = frozenset({"default", "linear", "llama3", "mrope", "yarn"})


def _rope_types(parameters: Any) -> set[str]:
    """Every ``rope_type`` in a text config's ``rope_parameters``, which may differ by kind of layer."""
    if not isinstance(parameters, Mapping):
        return set()
    nested = [_rope_types(value) for value in parameters.values()]
    return set().union({parameters.get("rope_type", "default")}, *nested)


def backbone(model: nn.Module) -> nn.Module:
    """The multimodal model without its head, of an unwrapped (possibly PEFT) model."""
    if is_peft_model(model):
        model = model.base_model.model
    return model.base_model  # `get_decoder()` would be the text stack alone


def is_verified(model: nn.Module) -> bool:
    """Whether the packed forward is known to be exact for the family of an unwrapped (possibly PEFT) model."""
    config = backbone(model).config
    text = config.get_text_config()
    # Some stacks without ``rope_parameters`` have no rotary positions, or carry a state from token to token.
    rope = _rope_types(getattr(text, "rope_parameters", None))
    if getattr(text, "use_bidirectional_attention", None) or not rope or rope - FIXED_ROPE:
        return False
    return config.model_type in VERIFIED | VERIFIED_TEXT and text.model_type in VERIFIED_TEXT


def prompt_positions(model: nn.Module, prompt_ids: Tensor, images: Mapping[str, Tensor]) -> Tensor:
    """Rotary positions of one prompt, as the model would compute them for this prompt alone.

    A response counts on, on every axis, from the largest of them.

    Args:
        model: an unwrapped (possibly PEFT) model of a verified family, on any device.
        prompt_ids: [P] int64 on the CPU, image placeholders expanded; the text-only prompt for the text-only view.
        images: the prompt's image fields; only ``image_grid_thw`` is read, best kept on the CPU. Empty for text.

    Returns:
        [R, P] int64 on the CPU; R is 3 (time, height, width) for mRoPE families, else 1.

    Raises:
        ValueError: the prompt does not have as many placeholders as its images make tokens.
    """
    inner = backbone(model)
    rows = 3 if inner.config.model_type in MROPE else 1
    grid = images.get("image_grid_thw")
    if rows == 1 or grid is None:
        return torch.arange(len(prompt_ids)).expand(rows, -1)
    ids = prompt_ids[None]
    kinds = (ids == inner.config.image_token_id).int()
    tokens = int(grid.prod(dim=-1).sum()) // inner.config.vision_config.spatial_merge_size**2
    if tokens != kinds.sum():
        raise ValueError(
            f"prompt_ids has {int(kinds.sum())} image placeholders, but its images of grids {grid.tolist()} make "
            f"{tokens} tokens: prompt and images have lost their alignment."
        )
    return inner.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid.cpu())[0][:, 0]


#: Names in a config of the tokens that stand for pictures, videos or sounds, or begin or end them.
_MEDIA_TOKEN = re.compile(r"((image|img|video|audio|vision|speech)\w*|[be]o[iav])_token_(id|index)")


def placeholder_ids(config: Any) -> list[int]:
    """Ids of the tokens of pictures, videos and sounds (they, their starts and ends) that a config declares, sorted.

    Args:
        config: a model's; nested configs count too.
    """
    found: set[int] = set()
    for name, value in vars(config).items():
        if _MEDIA_TOKEN.fullmatch(name) and value is not None:
            found |= set(value) if isinstance(value, (list, tuple)) else {value}
        elif isinstance(value, PreTrainedConfig):
            found |= set(placeholder_ids(value))
    return sorted(found)


VISION_TOWERS = ("visual", "vision_tower", "vision_model")


def freeze(model: nn.Module, *, vision: bool = False, embeddings: bool = False) -> None:
    """Take a student's vision tower or input embeddings (and with them a tied output head) out of training.

    Raises:
        ValueError: no vision tower is found under a known name.
    """
    if vision:
        towers = [module for name in VISION_TOWERS if (module := getattr(backbone(model), name, None)) is not None]
        if not towers:
            raise ValueError(f"freeze_vision found none of {', '.join(VISION_TOWERS)} in {type(model).__name__}.")
        for tower in towers:
            tower.requires_grad_(False)
    if embeddings:
        model.get_input_embeddings().requires_grad_(False)
