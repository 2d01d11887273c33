"""What a family of models is: its body, its image tokens, and the parts of it that can be frozen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError
from .adapters import without_adapter


def backbone(model: Any) -> Any:
    """The multimodal model without its head, of an unwrapped (possibly PEFT) model of transformers."""
    return without_adapter(model).base_model  # `get_decoder()` would be the text stack alone


def device_of(model: Any) -> torch.device:
    """Where an unwrapped (possibly PEFT) model takes its token ids."""
    return model.get_input_embeddings().weight.device


def nested_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config, and all configs in it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from nested_configs(value)


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
    for part in nested_configs(config):
        for name, value in vars(part).items():
            if _MEDIA_TOKEN.fullmatch(name) and value is not None:
                found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return sorted(found)


def freeze(model: Any, *, vision: bool = False, embeddings: bool = False) -> None:
    """Take a student's vision tower or input embeddings (and with them a tied output head) out of training.

    The tower is what the model's config describes as ``vision_config``; what maps its output to the text model's width
    still trains. Input embeddings are all tables of the text model that are looked up by tokens: Gemma 4 has one for
    all layers, too, and Qwen 4 one of several tokens together.

    Raises:
        ConfigError: the model has no vision tower, or nothing of it is left to train.
    """
    body = backbone(model)
    if vision:
        described = type(getattr(body.config, "vision_config", None))
        towers = [x for x in body.modules() if isinstance(x, PreTrainedModel) and type(x.config) is described]
        if not towers:
            raise ConfigError(
                f"freeze_vision is true, but {type(model).__name__} has no vision tower: nothing in it is a model of "
                "its config's vision_config. Set freeze_vision to false."
            )
        for tower in towers:
            tower.requires_grad_(False)
    if embeddings:
        tables = [x for x in body.get_decoder().modules() if isinstance(x, nn.Embedding)]
        for table in (model.get_input_embeddings(), *tables):
            table.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"No parameter of the {type(model).__name__} requires gradient: nothing would be trained. An adapter that "
            "lies in the model's folder is loaded frozen: merge it into the weights, or take its files away and give "
            "section lora (peft_config)."
        )
