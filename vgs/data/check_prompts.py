"""Small prompts in both views, for the question how a model may be run (``vgs.models.self_check``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from ..errors import ConfigError
from ..models.groups import PromptGroup
from .prompts import encode_groups

SIZES = ((64, 64), (96, 64))  # (width, height) in pixels: a few tokens each in most families
COLOURS = ("red", "green")
#: About a hundred tokens.
TEXT = (
    "Look at every part of the picture before you answer. How many squares are there, how many circles, and which of "
    "them are red, green, blue or grey? Count from left to right and from top to bottom, write down 1, 2, 3, 4, 5, 6, "
    "7, 8, 9 as you go, and say at the end in one short sentence what the whole shows and why you think so. If there "
    "is no picture, say what such a picture could show instead, and be brief about it."
)


def check_prompts(processor: Any, forbidden: Sequence[int], **template_options: Any) -> list[PromptGroup]:
    """Prompts with one picture, with two of different sizes where the family takes two, and with none.

    Args:
        processor: a model's; the tokenizer of a text-only model.
        forbidden: placeholder ids, see ``vgs.models.families.placeholder_ids``.
        **template_options: for the chat template.

    Raises:
        ConfigError: the processor cannot encode such a prompt; its words.
    """
    images = [Image.new("RGB", size, colour) for size, colour in zip(SIZES, COLOURS, strict=True)]

    def encoded(count: int, text: str) -> list[PromptGroup]:
        sample = {"prompt": [{"role": "user", "content": text}], "images": images[:count]}
        return encode_groups(processor, [sample], [[[]]], forbidden, **template_options)

    if not isinstance(processor, ProcessorMixin):
        return encoded(0, TEXT)
    groups = encoded(0, TEXT[: len(TEXT) // 2]) + encoded(1, TEXT)
    with suppress(ConfigError):  # one picture a prompt, in some families
        groups += encoded(2, TEXT)
    return groups
