"""Of every config class of the installed transformers: media tokens are found, and no ordinary token is among them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as IMAGE_TEXT

from vgs.models.families import placeholder_ids

#: Part of a name that speaks of pictures, videos or sounds, however it is abbreviated.
MEDIA = re.compile(
    r"image|img|im_|video|vid|audio|vision|visual|speech|frame|slice|crop|tile|patch|boi|eoi|boa|eoa|bov|eov"
)
#: Names with such a part of other things: marks of chat messages, and what is no id of a token.
OTHERS = re.compile(
    r"im_(start|end)_token_id|audio_(stream|prompt|latent|delay|pad)\w*|num_.*|.*_layer_ids?|.*hidden.*|vision_.*_layer.*"
)
#: What ends a message, or is written beside pictures too.
ORDINARY = re.compile(r"(eos|pad|bos|eod|user|system|assistant|newline)(_token)?_id|im_(start|end)_token_id")


@cache
def config_of(family: str) -> PreTrainedConfig | None:
    """With everything as its class has it; None where a class wants arguments."""
    try:
        return CONFIG_MAPPING[family]()
    except Exception:
        return None


def fields(config: Any, mapped: bool = True) -> Iterator[tuple[str, list[int]]]:
    """Names and values that are ids, of a config and those inside it."""
    names = set(vars(config)) | (set(config.attribute_map) if mapped else set())
    for name in sorted(names):
        if name.endswith("_config"):
            inner = getattr(config, name)
            if isinstance(inner, PreTrainedConfig):
                yield from fields(inner, mapped)
        elif re.search(r"_(id|ids|index)$", name):
            value = getattr(config, name)
            listed = list(value) if isinstance(value, (list, tuple)) else [value]
            yield name, [x for x in listed if isinstance(x, int) and x >= 0]


@pytest.mark.parametrize("family", IMAGE_TEXT)
def test_every_media_token_of_a_config_is_forbidden(family: str) -> None:
    if (config := config_of(family)) is None:
        pytest.skip("its class has no defaults")
    found = set(placeholder_ids(config))
    missed = {name: ids for name, ids in fields(config) if MEDIA.search(name) and not OTHERS.fullmatch(name)}
    assert not {name: ids for name, ids in missed.items() if not set(ids) <= found}
    ordinary = {x for name, ids in fields(config, mapped=False) if ORDINARY.fullmatch(name) for x in ids}
    assert not found & ordinary
