"""Gemma: pictures whose tokens see each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.utils import is_timm_available

from .common import MERGED, SIDE, WINDOW, Ids, Options, Recipe, square, vision
from .texts import SPEECH as USUAL_SPEECH

KINDS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def _gemma3(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Gemma3Config(
        text_config={**text, **KINDS, "query_pre_attn_scalar": 16, "tie_word_embeddings": tie},
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


CAPPED = {"final_logit_softcapping": 30.0, "global_head_dim": 16}
#: The smallest ones: a table for all layers, and layers that take keys and values from those below.
SMALL = {"num_hidden_layers": 4, "layer_types": 2 * KINDS["layer_types"], "num_kv_shared_layers": 2}
MIXTURE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}


def _gemma4_ids(ids: Ids) -> Options:
    return {
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "audio_token_id": ids["<|audio|>"],
        "boi_token_id": ids["<|image>"],
        "eoi_token_id": ids["<image|>"],
        "boa_token_id": ids["<|audio>"],
        "eoa_token_index": ids["<audio|>"],
    }


def _gemma4(bidirectional: bool, tables: bool, **options: Any) -> Callable[[Options, Ids, bool], PreTrainedConfig]:
    def build(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
        layers = {"hidden_size_per_layer_input": 8 * tables, "vocab_size_per_layer_input": text["vocab_size"]}
        own = {"use_bidirectional_attention": "vision" if bidirectional else None, "tie_word_embeddings": tie}
        heads = {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 256}
        sizes = {name: value for name, value in vision(patch_size=4, **heads).items() if name != "image_size"}
        return hf.Gemma4Config(
            text_config={**text, **KINDS, **CAPPED, **layers, **own, **options},
            vision_config=sizes,
            tie_word_embeddings=tie,
            **_gemma4_ids(ids),
        )

    return build


def _gemma4_unified(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    sizes = {"patch_size": 4, "mm_embed_dim": text["hidden_size"], "mm_posemb_size": 64}
    return hf.Gemma4UnifiedConfig(
        text_config={**text, **KINDS, **CAPPED, "use_bidirectional_attention": "vision", "tie_word_embeddings": tie},
        vision_config={**sizes, "output_proj_dims": text["hidden_size"]},
        tie_word_embeddings=tie,
        **_gemma4_ids(ids),
    )


def _gemma4_processor(kind: str) -> Callable[[Any], ProcessorMixin]:
    def build(tokenizer: Any) -> ProcessorMixin:
        sizes = {"patch_size": 4, "max_soft_tokens": 70}
        return getattr(hf, f"{kind}Processor")(
            getattr(hf, f"{kind}AudioFeatureExtractor")(),
            getattr(hf, f"{kind}ImageProcessor")(**sizes),
            tokenizer,
            getattr(hf, f"{kind}VideoProcessor")(**sizes),
            image_seq_length=70,
            chat_template=tokenizer.chat_template,
        )

    return build


def _gemma3n(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    layers = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": text["vocab_size"] - 8}
    width = {"laurel_rank": 4, "altup_num_inputs": 2, "tie_word_embeddings": tie}
    sound = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "vocab_size": 8}
    # Tokens of pictures and sounds that are looked up stand behind all others.
    marks = {"vocab_offset": text["vocab_size"] - 16}, {"vocab_offset": text["vocab_size"] - 8}
    # The model scales its tower's output in place, so the tower must not need that output for its gradient.
    tower = {"architecture": "test_convnext", "hidden_size": 64, "vocab_size": 8}
    return hf.Gemma3nConfig(
        text_config={**text, **KINDS, **SMALL, **layers, **width},
        vision_config={**tower, **marks[0]},
        audio_config={**sound, "sscp_conv_channel_size": [8, 4], **marks[1]},
        vision_soft_tokens_per_image=MERGED,
        image_token_id=ids["<image_soft_token>"],
        boi_token_id=ids["<start_of_image>"],
        eoi_token_id=ids["<end_of_image>"],
        audio_token_id=ids["<audio_soft_token>"],
        boa_token_id=ids["<start_of_audio>"],
        eoa_token_id=ids["<end_of_audio>"],
        tie_word_embeddings=tie,
    )


def _gemma3n_processor(tokenizer: Any) -> ProcessorMixin:
    images = hf.SiglipImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE})
    return hf.Gemma3nProcessor(
        hf.Gemma3nAudioFeatureExtractor(),
        images,
        tokenizer,
        image_seq_length=MERGED,
        chat_template=tokenizer.chat_template,
    )


RECIPES = {
    "gemma3": Recipe(_gemma3, _gemma3_processor),
    "gemma4": Recipe(_gemma4(True, True), _gemma4_processor("Gemma4")),
    "gemma4_small": Recipe(_gemma4(False, True, **SMALL), _gemma4_processor("Gemma4")),
    "gemma4_moe": Recipe(_gemma4(True, False, attention_k_eq_v=True, **MIXTURE), _gemma4_processor("Gemma4")),
    "gemma4_unified": Recipe(_gemma4_unified, _gemma4_processor("Gemma4Unified")),
}
if is_timm_available():  # its tower
    RECIPES["gemma3n"] = Recipe(_gemma3n, _gemma3n_processor)
SPEECH = {
    "gemma3n": replace(
        USUAL_SPEECH["gemma3"],
        named={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "audio_token": "<audio_soft_token>",
            "boa_token": "<start_of_audio>",
            "eoa_token": "<end_of_audio>",
        },
        image="<image_soft_token>",
    )
}
