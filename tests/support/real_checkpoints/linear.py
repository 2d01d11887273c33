"""LFM2-VL and LFM3-VL: text stacks with short convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import PATCH, SIDE, Ids, Options, Recipe, special_ids, vision
from .texts import SPEECH as QWEN_SPEECH

CONV = {"layer_types": ["conv", "full_attention"]}


def _lfm2_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    sizes = {name: value for name, value in vision(num_patches=64).items() if name != "image_size"}
    return hf.Lfm2VlConfig(
        text_config=hf.Lfm2Config(**text, **CONV, block_auto_adjust_ff_dim=False, tie_word_embeddings=tie),
        vision_config=hf.Siglip2VisionConfig(**sizes, vision_use_head=False),
        image_token_id=ids["<image>"],
        projector_hidden_size=32,
        tie_word_embeddings=tie,
    )


def _lfm2_vl_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"encoder_patch_size": PATCH, "tile_size": SIDE, "max_tiles": 4}
    images = hf.Lfm2VlImageProcessor(
        **sizes, min_image_tokens=4, max_image_tokens=16, max_num_patches=64, max_pixels_tolerance=1.0
    )
    return hf.Lfm2VlProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def _lfm3_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.Lfm3VlConfig(
        text_config=hf.Lfm3Config(**text, **CONV, tie_word_embeddings=tie),
        vision_config={**sizes, **CONV, "num_key_value_heads": 1, "patch_size": PATCH},
        projector_hidden_size=32,
        tie_word_embeddings=tie,
        **special_ids(ids),
    )


def _lfm3_vl_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    sizes |= {"size": {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}}
    images, videos = hf.Qwen2VLImageProcessor(**sizes), hf.Qwen3VLVideoProcessor(**sizes)
    return hf.Lfm3VlProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


_QWEN = QWEN_SPEECH["qwen3_5"]
_CELLS = tuple(f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5))

RECIPES = {
    "lfm2_vl": Recipe(_lfm2_vl, _lfm2_vl_processor),
}
if hasattr(hf, "Lfm3VlConfig"):  # not in the oldest version that we support
    RECIPES["lfm3_vl"] = Recipe(_lfm3_vl, _lfm3_vl_processor)
SPEECH = {
    "lfm2_vl": replace(
        _QWEN,
        image="<image>",
        bos="<|startoftext|>",
        opening="{{ bos_token }}",
        answer="<|im_start|>assistant\n",
        specials=("<|im_start|>", "<image>", "<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", *_CELLS),
        words=(),
    ),
    "lfm3_vl": replace(_QWEN, answer="<|im_start|>assistant\n"),
}
