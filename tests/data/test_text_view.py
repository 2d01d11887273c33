"""Families without a text-only view, or with fields that nobody knows how to join, end in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as hf
from PIL import Image
from real_checkpoints import REAL_FAMILIES
from real_checkpoints.texts import chatml
from transformers import AutoConfig, AutoProcessor, ProcessorMixin

import vgs
from vgs.data.prompts import check_text_view
from vgs.errors import ConfigError
from vgs.models.families import placeholder_ids

SQUARE = {"height": 32, "width": 32}
SPECIALS = ("<|im_start|>",)


def paligemma() -> ProcessorMixin:
    tokenizer = chatml("<image>", specials=SPECIALS, named={"image_token": "<image>"}, bos="<bos>").tokenizer()
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def mllama() -> ProcessorMixin:
    specials = (*SPECIALS, "<|python_tag|>")
    tokenizer = chatml("<|image|>", specials=specials, named={"image_token": "<|image|>"}, bos="<bos>").tokenizer()
    images = hf.MllamaImageProcessor(size=SQUARE, max_image_tiles=4)
    return hf.MllamaProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


NO_TEXT = (
    r"PaliGemmaProcessor takes no prompt without its images \(`images` are expected .* instance\.\): its family has no "
    r"text-only view, and cannot be steered by what images change\.$"
)
NO_RULE = (
    "MllamaProcessor returns the field 'cross_attention_mask', for which there is no rule how prompts are joined: this "
    "family is not supported."
)


@pytest.mark.parametrize(("build", "words"), [(paligemma, NO_TEXT), (mllama, NO_RULE)])
def test_such_a_family_is_refused_in_one_sentence(build: Callable[[], Any], words: str) -> None:
    processor = build()
    with pytest.raises(ConfigError, match="^" + words):
        check_text_view(processor, [])
    sample = {"prompt": [{"role": "user", "content": "red ?"}], "images": [Image.new("RGB", (40, 32))]}
    with pytest.raises(ConfigError, match="^sample 0: " + words):
        vgs.encode_groups(processor, [sample], [[[5]]], [])


@pytest.mark.parametrize("family", REAL_FAMILIES[:3] + REAL_FAMILIES[-2:])
def test_others_pass(family: str, checkpoint: Callable[..., Any]) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    forbidden = placeholder_ids(AutoConfig.from_pretrained(checkpoint(family)))
    check_text_view(processor, forbidden)
    check_text_view(processor.tokenizer, [])
    with pytest.raises(ConfigError, match="contains the image placeholder"):
        check_text_view(processor, [processor.tokenizer.convert_tokens_to_ids("a")])
