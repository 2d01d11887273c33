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


def backbone(model: nn.Module) -> nn.Module:
    """The multimodal model without its head, of an unwrapped (possibly PEFT) model."""
    if is_peft_model(model):
        model = model.base_model.model
    return model.base_model  # `get_decoder()` would be the text stack alone


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


#: Names in a config of the tokens that stand for pictures, videos or sounds, or begin, end or divide them.
_MEDIA_TOKEN = re.compile(
    r"(low_res_)?((image|img|video|audio|vision|visual|speech|frame|slice)\w*|[be]o[iav]_token)_(id|ids|index)"
    r"|im_(start|end|newline)_id"
)


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

    Input embeddings are all tables of the text stack that are looked up by token: Gemma 4 has one for all layers, too.

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
        table = model.get_input_embeddings()
        table.requires_grad_(False)
        size = getattr(table, "num_embeddings", None) or len(table.weight)
        for module in backbone(model).modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings >= size:
                module.requires_grad_(False)
