"""Families that cut a picture into tiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import EXPERTS, MERGED, PATCH, SIDE, WINDOW, Ids, Options, Recipe, square, vision
from .texts import SPEECH as USUAL_SPEECH
from .texts import chatml


def _internvl(text_class: str, text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.InternVLConfig(
        text_config=getattr(hf, text_class)(**text, tie_word_embeddings=tie),
        vision_config=vision(image_size=(SIDE, SIDE), patch_size=(PATCH, PATCH)),
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=MERGED,
        tie_word_embeddings=tie,
    )


def _internvl_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(**square(crop_to_patches=True, min_patches=1, max_patches=4)),
        tokenizer,
        hf.InternVLVideoProcessor(**square()),
        image_seq_length=MERGED,
        chat_template=tokenizer.chat_template,
    )


def _internvl_moe(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return _internvl("Qwen3MoeConfig", {**text, **EXPERTS, "num_experts": 4}, ids, tie)


def _ovis2(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    marks = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    return hf.Ovis2Config(
        text_config=hf.Qwen2Config(**text, tie_word_embeddings=tie),
        vision_config={**vision(), "vocab_size": 24, "hidden_stride": 2},
        image_token_id=ids["<IMG_ATOM>"],
        visual_indicator_token_ids=[ids[mark] for mark in marks],
        vocab_size=text["vocab_size"],
        hidden_size=text["hidden_size"],
        tie_word_embeddings=tie,
    )


def _ovis2_processor(tokenizer: Any) -> ProcessorMixin:
    images = hf.Ovis2ImageProcessor(**square(crop_to_patches=True, min_patches=1, max_patches=4))
    return hf.Ovis2Processor(images, tokenizer, tokenizer.chat_template, image_seq_length=MERGED)


def _idefics(config: str, encoder: str) -> Callable[[Options, Ids, bool], PreTrainedConfig]:
    def build(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
        return getattr(hf, config)(
            text_config=hf.LlamaConfig(**text, tie_word_embeddings=tie),
            vision_config={"model_type": encoder, **vision()},
            image_token_id=ids["<image>"],
            scale_factor=2,
            tie_word_embeddings=tie,
        )

    return build


def _idefics_images(name: str) -> Any:
    size, tile = {"longest_edge": 2 * SIDE}, {"longest_edge": SIDE}
    return getattr(hf, name)(size=size, max_image_size=tile)


def _smolvlm_processor(tokenizer: Any) -> ProcessorMixin:
    sampling = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": SIDE}}
    videos = hf.SmolVLMVideoProcessor(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, video_sampling=sampling
    )
    images = _idefics_images("SmolVLMImageProcessor")
    options = {"image_seq_len": MERGED, "chat_template": tokenizer.chat_template}
    return hf.SmolVLMProcessor(images, tokenizer, videos, **options)


def _idefics3_processor(tokenizer: Any) -> ProcessorMixin:
    options = {"image_seq_len": MERGED, "chat_template": tokenizer.chat_template}
    return hf.Idefics3Processor(_idefics_images("Idefics3ImageProcessor"), tokenizer, **options)


def _cohere_text(text: Options, tie: bool) -> PreTrainedConfig:
    kinds = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"], "logit_scale": 0.25}
    return hf.Cohere2Config(**text, **kinds, tie_word_embeddings=tie)


def _aya(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.AyaVisionConfig(
        text_config=_cohere_text(text, tie),
        vision_config=hf.SiglipVisionConfig(**vision(), vision_use_head=False),
        image_token_id=ids["<|IMG_PATCH|>"],
        tie_word_embeddings=tie,
    )


def _aya_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessor(**square(crop_to_patches=True, min_patches=1, max_patches=4)),
        tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=tokenizer.chat_template,
    )


def _cohere2_vision(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Cohere2VisionConfig(
        text_config=_cohere_text(text, tie),
        vision_config=hf.SiglipVisionConfig(**vision(), vision_use_head=False),
        image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=64,
        tie_word_embeddings=tie,
    )


def _cohere2_processor(tokenizer: Any) -> ProcessorMixin:
    # This processor takes the square of ``patch_size`` for the number of tokens of a tile.
    images = hf.Cohere2VisionImageProcessor(**square(max_patches=4, patch_size=int(MERGED**0.5)))
    return hf.Cohere2VisionProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


RECIPES = {
    "internvl": Recipe(partial(_internvl, "Qwen2Config"), _internvl_processor),
    "internvl_moe": Recipe(_internvl_moe, _internvl_processor),
    "ovis2": Recipe(_ovis2, _ovis2_processor),
    "smolvlm": Recipe(_idefics("SmolVLMConfig", "smolvlm_vision"), _smolvlm_processor),
    "idefics3": Recipe(_idefics("Idefics3Config", "idefics3_vision"), _idefics3_processor),
    "aya_vision": Recipe(_aya, _aya_processor),
    "cohere2_vision": Recipe(_cohere2_vision, _cohere2_processor),
}
SPEECH = {
    "internvl_moe": USUAL_SPEECH["internvl"],
    "ovis2": chatml(
        "<image>\n",
        specials=(
            *("<|im_start|>", "<image>", "<IMG_ATOM>"),
            *("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
        ),
    ),
}
