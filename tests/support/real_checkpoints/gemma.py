"""Gemma: pictures whose tokens see each other."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import MERGED, WINDOW, Ids, Options, Recipe, square, vision


def _gemma3(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    kinds = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return hf.Gemma3Config(
        text_config={**text, **kinds, "query_pre_attn_scalar": 16, "tie_word_embeddings": tie},
        vision_config=vision(vision_use_head=False),
        mm_tokens_per_image=MERGED,
        image_token_id=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        tie_word_embeddings=tie,
    )


def _gemma3_processor(tokenizer: Any) -> ProcessorMixin:
    images = hf.Gemma3ImageProcessor(**square())
    return hf.Gemma3Processor(images, tokenizer, image_seq_length=MERGED, chat_template=tokenizer.chat_template)


def _gemma4(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    kinds = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    layers = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": text["vocab_size"], "global_head_dim": 16}
    soft = {"final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision", "tie_word_embeddings": tie}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 256}
    sizes = {name: value for name, value in vision(patch_size=4, **heads).items() if name != "image_size"}
    return hf.Gemma4Config(
        text_config={**text, **kinds, **layers, **soft},
        vision_config=sizes,
        image_token_id=ids["<|image|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        boi_token_id=ids["<|image>"],
        eoi_token_id=ids["<image|>"],
        boa_token_id=ids["<|audio>"],
        eoa_token_index=ids["<audio|>"],
        tie_word_embeddings=tie,
    )


def _gemma4_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"patch_size": 4, "max_soft_tokens": 70}
    return hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(**sizes),
        tokenizer,
        hf.Gemma4VideoProcessor(**sizes),
        image_seq_length=70,
        chat_template=tokenizer.chat_template,
    )


RECIPES = {
    "gemma3": Recipe(_gemma3, _gemma3_processor),
    "gemma4": Recipe(_gemma4, _gemma4_processor),
}
