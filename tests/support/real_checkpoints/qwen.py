"""Qwen: pictures as rows of patches, with a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import EXPERTS, PATCH, SIDE, Ids, Options, Recipe, special_ids


def _qwen_processor(name: str, video: str = "Qwen2VLVideoProcessor") -> Callable[[Any], ProcessorMixin]:
    def build(tokenizer: Any) -> ProcessorMixin:
        sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        size = {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}
        images = hf.Qwen2VLImageProcessor(**sizes, size=size)
        videos = getattr(hf, video)(**sizes, size=size)
        return getattr(hf, name)(images, tokenizer, videos, chat_template=tokenizer.chat_template)

    return build


def _rope(section: list[int], **options: Any) -> Options:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section, **options}}


def _qwen2_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
    return hf.Qwen2VLConfig(
        text_config={**text, **_rope([4, 2, 2])},
        vision_config={**vision, "hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie,
        **special_ids(ids),
    )


def _qwen2_5_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": PATCH}
    windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLConfig(
        text_config={**text, **_rope([4, 2, 2])},
        vision_config={**vision, **windows, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie,
        **special_ids(ids),
    )


def _qwen3_vision(text: Options) -> Options:
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": PATCH}
    return {**sizes, "out_hidden_size": text["hidden_size"], "num_position_embeddings": 64}


def _qwen3_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Qwen3VLConfig(
        text_config={**text, **_rope([4, 2, 2], mrope_interleaved=True)},
        vision_config={**_qwen3_vision(text), "deepstack_visual_indexes": [0]},
        tie_word_embeddings=tie,
        **special_ids(ids),
    )


def _qwen3_vl_moe(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    rope = _rope([4, 2, 2], mrope_interleaved=True)
    return hf.Qwen3VLMoeConfig(
        text_config={**text, **rope, **EXPERTS, "num_experts": 4, "tie_word_embeddings": tie},
        vision_config={**_qwen3_vision(text), "deepstack_visual_indexes": [0]},
        tie_word_embeddings=tie,
        **special_ids(ids),
    )


def _qwen3_5(config: str, **experts: int) -> Callable[[Options, Ids, bool], PreTrainedConfig]:
    def build(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
        linear = {
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        }
        rope = _rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5)
        return getattr(hf, config)(
            text_config={**text, **linear, **rope, **experts, "tie_word_embeddings": tie},
            vision_config=_qwen3_vision(text),
            tie_word_embeddings=tie,
            **special_ids(ids),
        )

    return build


_EXPERTS = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16}

RECIPES = {
    "qwen2_vl": Recipe(_qwen2_vl, _qwen_processor("Qwen2VLProcessor")),
    "qwen2_5_vl": Recipe(_qwen2_5_vl, _qwen_processor("Qwen2_5_VLProcessor")),
    "qwen3_vl": Recipe(_qwen3_vl, _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")),
    "qwen3_vl_moe": Recipe(_qwen3_vl_moe, _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")),
    "qwen3_5": Recipe(_qwen3_5("Qwen3_5Config"), _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")),
    "qwen3_5_moe": Recipe(
        _qwen3_5("Qwen3_5MoeConfig", **_EXPERTS), _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
    ),
}
