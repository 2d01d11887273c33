"""What a family of models is: its body, its image tokens, and the parts of it that can be frozen."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .adapters import is_peft_model


def backbone(model: nn.Module) -> nn.Module:
    """The multimodal model without its head, of an unwrapped (possibly PEFT) model."""
    if is_peft_model(model):
        model = model.base_model.model
    return model.base_model  # `get_decoder()` would be the text stack alone


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
