"""Families whose processors make fields of their own, which are joined by rules of their own."""

from __future__ import annotations

from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import PATCH, SIDE, WINDOW, Ids, Options, Recipe
from .texts import Speech, chatml

ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": PATCH}
#: Of a text stack with one layer of linear attention.
LINEAR = {
    "model_type": "qwen3_5_text",
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.5,
    },
}


def _minicpm_config(name: str, **extra: str) -> Any:
    def build(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
        return getattr(hf, name)(
            text_config={**text, **LINEAR, "tie_word_embeddings": tie},
            vision_config={**ENCODER, "intermediate_size": 48, "image_size": 4 * SIDE},
            insert_layer_id=0,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            tie_word_embeddings=tie,
            **{name: ids[token] for name, token in extra.items()},
        )

    return build


def _minicpm_processor(name: str) -> Any:
    def build(tokenizer: Any) -> ProcessorMixin:
        sizes = {"patch_size": PATCH, "scale_resolution": SIDE, "max_slice_nums": 4}
        images = hf.MiniCPMV4_6ImageProcessor(**sizes)
        videos = hf.MiniCPMV4_6VideoProcessor(**sizes)
        return getattr(hf, name)(images, videos, tokenizer, chat_template=tokenizer.chat_template)

    return build


def _molmo2(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return hf.Molmo2Config(
        text_config={**text, "additional_vocab_size": 0},
        vision_config={**ENCODER, **heads, "intermediate_size": 48, "image_size": [SIDE, SIDE]},
        adapter_config={
            **heads,
            "hidden_size": 32,
            "vision_feature_layer": [1, 0],
            "intermediate_size": 48,
            "text_hidden_size": text["hidden_size"],
        },
        image_start_token_id=ids["<im_start>"],
        low_res_image_start_token_id=ids["<low_res_im_start>"],
        image_end_token_id=ids["<im_end>"],
        image_patch_id=ids["<im_patch>"],
        frame_start_token_id=ids["<frame_start>"],
        frame_end_token_id=ids["<frame_end>"],
        tie_word_embeddings=tie,
    )


def _molmo2_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"size": {"height": SIDE, "width": SIDE}, "patch_size": PATCH}
    images = hf.Molmo2ImageProcessor(**sizes, max_crops=4, overlap_margins=[1, 1])
    videos = hf.Molmo2VideoProcessor(**sizes)
    return hf.Molmo2Processor(images, videos, tokenizer, chat_template=tokenizer.chat_template)


def _step3p7(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "share_expert_dim": 16}
    kinds = {"mlp_layer_types": ["dense", "sparse"], "layer_types": ["sliding_attention", "full_attention"]}
    return hf.Step3p7Config(
        text_config={**text, **experts, **kinds, "sliding_window": WINDOW, "tie_word_embeddings": tie},
        vision_config={**ENCODER, "image_size": 2 * SIDE, "mlp_ratio": 1.5, "max_position_embeddings": 64},
        image_token_id=ids["<im_patch>"],
        tie_word_embeddings=tie,
    )


def _step3p7_processor(tokenizer: Any) -> ProcessorMixin:
    side = {"size": {"height": 2 * SIDE, "width": 2 * SIDE}, "patch_size": SIDE}
    images = hf.Step3p7ImageProcessor(**side, vision_patch_size=PATCH, downsampler_stride=4)
    return hf.Step3p7Processor(images, tokenizer, chat_template=tokenizer.chat_template)


def _nemotron(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    mamba = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
    kinds = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention"]}
    sizes = {"image_size": 2 * SIDE, "max_img_size": 4 * SIDE, "video_temporal_patch_size": 2}
    return hf.NemotronH_Omni_Reasoning_V3_Config(
        text_config={**text, **mamba, **kinds, "tie_word_embeddings": tie},
        vision_config={"model_type": "radio", **ENCODER, **sizes},
        vision_hidden_size=32,
        projector_hidden_size=32,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
    )


def _nemotron_processor(tokenizer: Any) -> ProcessorMixin:
    images = hf.NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=PATCH, min_num_patches=4, max_num_patches=64)
    videos = hf.NemotronH_Omni_Reasoning_V3VideoProcessor()
    return hf.NemotronH_Omni_Reasoning_V3Processor(
        images, videos, tokenizer, hf.ParakeetFeatureExtractor(), chat_template=tokenizer.chat_template
    )


def _video_llama3(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.VideoLlama3Config(
        text_config={"model_type": "qwen2", **text, "tie_word_embeddings": tie},
        vision_config={**ENCODER, "intermediate_size": 48},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=tie,
    )


def _video_llama3_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"patch_size": PATCH, "size": {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}}
    images = hf.VideoLlama3ImageProcessor(**sizes, merge_size=2)
    videos = hf.VideoLlama3VideoProcessor(**sizes)
    return hf.VideoLlama3Processor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def _deepseek_hybrid(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    large = {"output_channels": 32, "global_attn_indexes": [1], "window_size": 2, "mlp_dim": 48}
    return hf.DeepseekVLHybridConfig(
        text_config={"model_type": "llama", **text, "tie_word_embeddings": tie},
        vision_config={"model_type": "siglip_vision_model", **ENCODER, "intermediate_size": 48, "image_size": SIDE},
        high_res_vision_config={"model_type": "sam_vision_model", **ENCODER, **large, "image_size": 2 * SIDE},
        image_token_id=ids["<image_placeholder>"],
        tie_word_embeddings=tie,
    )


def _deepseek_hybrid_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"size": {"height": SIDE, "width": SIDE}, "high_res_size": {"height": 2 * SIDE, "width": 2 * SIDE}}
    images = hf.DeepseekVLHybridImageProcessor(**sizes)
    tokens = (SIDE // PATCH) ** 2
    return hf.DeepseekVLHybridProcessor(
        images, tokenizer, num_image_tokens=tokens, chat_template=tokenizer.chat_template
    )


_MARKERS = {
    "image_start_id": "<image>",
    "image_end_id": "</image>",
    "slice_start_id": "<slice>",
    "slice_end_id": "</slice>",
    "newline_id": "Ċ",
}
RECIPES = {
    "minicpmv4_6": Recipe(_minicpm_config("MiniCPMV4_6Config"), _minicpm_processor("MiniCPMV4_6Processor")),
    "minicpmv4_7": Recipe(_minicpm_config("MiniCPMV4_7Config", **_MARKERS), _minicpm_processor("MiniCPMV4_7Processor")),
    "molmo2": Recipe(_molmo2, _molmo2_processor),
    "step3p7": Recipe(_step3p7, _step3p7_processor),
    "nemotron_h_omni": Recipe(_nemotron, _nemotron_processor),
    "video_llama_3": Recipe(_video_llama3, _video_llama3_processor),
    "deepseek_vl_hybrid": Recipe(_deepseek_hybrid, _deepseek_hybrid_processor),
}

_MINICPM = chatml(
    "<|image_pad|>",
    specials=("<|im_start|>",),
    named={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    },
)
_STEP = ("<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>")
_MOLMO = ("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>")
_FRAMES = ("<frame_start>", "<frame_end>")
_NEMOTRON = ("<image>", "<video>", "<so_embedding>", "<so_start>", "<so_end>", "<img>", "</img>")

SPEECH: dict[str, Speech] = {
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "molmo2": chatml("<|image|>", specials=("<|im_start|>", "<|image|>", "<|video|>", *_MOLMO, *_FRAMES)),
    "step3p7": chatml("<im_patch>", specials=("<|im_start|>", *_STEP)),
    "video_llama_3": chatml("<|image_pad|>", specials=("<|im_start|>", "<|image_pad|>", "<|video_pad|>")),
    "deepseek_vl_hybrid": chatml(
        "<image_placeholder>", specials=("<|im_start|>",), named={"image_token": "<image_placeholder>"}
    ),
    "nemotron_h_omni": chatml("<image>", specials=("<|im_start|>", *_NEMOTRON)),
}
