"""LLaVA and its relatives: an encoder of pictures of one size, or Pixtral."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import PATCH, PINPOINTS, SIDE, Ids, Options, Recipe, square, vision


def _llava(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text, tie_word_embeddings=tie),
        vision_config=hf.CLIPVisionConfig(**vision()),
        image_token_id=ids["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=tie,
    )


def _llava_processor(tokenizer: Any) -> ProcessorMixin:
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return hf.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _mistral_text(text: Options, tie: bool) -> PreTrainedConfig:
    return hf.MistralConfig(**text, sliding_window=None, tie_word_embeddings=tie)


def _pixtral(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=_mistral_text(text, tie),
        vision_config=hf.PixtralVisionConfig(**vision(image_size=2 * SIDE)),
        image_token_id=ids["[IMG]"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=tie,
    )


def _mistral3(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Mistral3Config(
        text_config=_mistral_text(text, tie),
        vision_config=hf.PixtralVisionConfig(**vision(image_size=2 * SIDE)),
        image_token_id=ids["[IMG]"],
        spatial_merge_size=2,
        tie_word_embeddings=tie,
    )


def _pixtral_processor(merge: int) -> Callable[[Any], ProcessorMixin]:
    def build(tokenizer: Any) -> ProcessorMixin:
        patch = {"height": PATCH, "width": PATCH}
        images = hf.PixtralImageProcessor(patch_size=patch, size={"longest_edge": 2 * SIDE})
        return hf.PixtralProcessor(
            images,
            tokenizer,
            patch_size=PATCH,
            spatial_merge_size=merge,
            chat_template=tokenizer.chat_template,
        )

    return build


def _llava_next(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.LlavaNextConfig(
        text_config=_mistral_text(text, tie),
        vision_config=hf.CLIPVisionConfig(**vision()),
        image_token_id=ids["<image>"],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tie,
    )


def _llava_next_processor(tokenizer: Any) -> ProcessorMixin:
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    images = hf.LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=PINPOINTS)
    return hf.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )


def _llava_onevision(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**text, tie_word_embeddings=tie),
        vision_config=hf.SiglipVisionConfig(**vision(), vision_use_head=False),
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tie,
    )


def _llava_onevision_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(**square(image_grid_pinpoints=PINPOINTS)),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(**square()),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


RECIPES = {
    "llava": Recipe(_llava, _llava_processor),
    "llava_pixtral": Recipe(_pixtral, _pixtral_processor(1)),
    "mistral3": Recipe(_mistral3, _pixtral_processor(2)),
    "llava_next": Recipe(_llava_next, _llava_next_processor),
    "llava_onevision": Recipe(_llava_onevision, _llava_onevision_processor),
}
