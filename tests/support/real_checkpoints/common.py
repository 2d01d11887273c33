"""What the recipes of tiny models and real processors share, one recipe a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, ProcessorMixin

SIDE, PATCH = 32, 8  # pixels: the side of an encoder's picture, and of its patches
MERGED = (SIDE // PATCH // 2) ** 2  # tokens of such a picture where two by two patches make one token
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
WINDOW = 8  # of sliding attention: shorter than a prompt

Ids = Mapping[str, int]
Options = dict[str, Any]


class Recipe(NamedTuple):
    """Builds a family's config and processor.

    Attributes:
        config: ``config(text, ids, tie)`` with the text options that all families share and the ids of the tokens.
        processor: ``processor(tokenizer)``.
    """

    config: Callable[[Options, Ids, bool], PreTrainedConfig]
    processor: Callable[[Any], ProcessorMixin]


def vision(**options: Any) -> Options:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": SIDE, "patch_size": PATCH, **options}


def square(**options: Any) -> Options:
    return {"size": {"height": SIDE, "width": SIDE}, **options}


def special_ids(ids: Ids) -> Options:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: ids[token] for name, token in names.items()}
