"""GLM-4.1V to 4.6V, Kimi K2.5 and Muse Spark: pictures as rows of patches, with a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import EXPERTS, PATCH, SIDE, WINDOW, Ids, Options, Recipe, latent, vision
from .texts import Speech, chatml

AREA = {"shortest_edge": 2 * SIDE**2, "longest_edge": 8 * SIDE**2}  # GLM counts pixels of two frames


def _glm(config: str, experts: bool) -> Callable[[Options, Ids, bool], PreTrainedConfig]:
    def build(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        parts = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1} if experts else {}
        encoder = {"depth": 2, "num_heads": 2, "hidden_size": 32, "intermediate_size": 48, "patch_size": PATCH}
        named = {
            f"{kind}_{place}token_id": ids[f"<|{mark}{kind}|>"]
            for kind in ("image", "video")
            for place, mark in (("", ""), ("start_", "begin_of_"), ("end_", "end_of_"))
        }
        return getattr(hf, config)(
            text_config={"model_type": "glm4v_moe_text", **text, **parts, "rope_parameters": rope}
            if experts
            else {"model_type": "glm4v_text", **text, "rope_parameters": rope},
            vision_config={
                "model_type": "glm4v_moe_vision" if experts else "glm4v_vision",
                **encoder,
                "image_size": SIDE,
                "out_hidden_size": text["hidden_size"],
            },
            tie_word_embeddings=tie,
            **named,
        )

    return build


def _glm_processor(name: str) -> Callable[[Any], ProcessorMixin]:
    def build(tokenizer: Any) -> ProcessorMixin:
        sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "size": AREA}
        images, videos = (getattr(hf, f"{name}{kind}Processor")(**sizes) for kind in ("Image", "Video"))
        return getattr(hf, f"{name}Processor")(images, tokenizer, videos, chat_template=tokenizer.chat_template)

    return build


_GLM = Speech(
    image="<|begin_of_image|><|image|><|end_of_image|>",
    turn="<|{role}|>\n",
    close="",
    answer="<|assistant|>\n",
    pad="<|endoftext|>",
    eos="<|user|>",
    opening="[gMASK]<sop>",
    specials=(
        *("[gMASK]", "<sop>", "<|assistant|>", "<|system|>", "<|image|>", "<|video|>"),
        *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    ),
)


def _kimi_k25(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    sizes = {name: value for name, value in vision().items() if name != "image_size"}
    return hf.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **latent(text), "num_mtp_layers": 0},
        vision_config={**sizes, "pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        image_token_id=ids["<|media_pad|>"],
        video_token_id=ids["<|kimi_k25_video_placeholder|>"],
        vision_start_token_id=ids["<|media_begin|>"],
        vision_end_token_id=ids["<|media_end|>"],
        tie_word_embeddings=tie,
    )


def _kimi_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"max_height": 8 * SIDE, "max_width": 8 * SIDE}}
    images, videos = hf.Kimi_K25ImageProcessor(**sizes), hf.Kimi_K25VideoProcessor(**sizes)
    return hf.Kimi_K25Processor(images, tokenizer, videos, chat_template=tokenizer.chat_template)


def _muse_spark(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    kinds = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_hidden_size": 16}
    audio = {"patch_sizes": [4, 4], "hidden_sizes": [8, 8], "depths": [1, 1], "num_hidden_layers": 2}
    sizes = {name: value for name, value in vision().items() if name != "image_size"}
    return hf.MuseSparkConfig(
        text_config={**text, **kinds, **experts, "tie_word_embeddings": tie},
        vision_config={**sizes, "pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16},
        audio_config={**audio, "out_hidden_size": text["hidden_size"]},
        out_hidden_size=4 * 32,
        projector_hidden_size=32,
        image_token_id=ids["<|patch|>"],
        video_token_id=ids["<|video|>"],
        audio_token_id=ids["<|audio|>"],
        tie_word_embeddings=tie,
    )


def _muse_processor(tokenizer: Any) -> ProcessorMixin:
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
    return hf.MuseSparkProcessor(
        hf.MuseGlimmerImageProcessor(**sizes),
        hf.MuseGlimmerVideoProcessor(**sizes),
        tokenizer,
        hf.MuseSparkFeatureExtractor(samples_per_token=16),
        chat_template=tokenizer.chat_template,
    )


RECIPES = {
    "glm4v": Recipe(_glm("Glm4vConfig", False), _glm_processor("Glm4v")),
    "glm4v_moe": Recipe(_glm("Glm4vMoeConfig", True), _glm_processor("Glm4v")),
    "glm46v": Recipe(_glm("Glm46VConfig", True), _glm_processor("Glm46V")),
    "kimi_k25": Recipe(_kimi_k25, _kimi_processor),
}
if hasattr(hf, "MuseSparkConfig"):  # not in the oldest version that we support
    RECIPES["muse_spark"] = Recipe(_muse_spark, _muse_processor)
SPEECH = {
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm46v": _GLM,
    "kimi_k25": chatml(
        "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n",
        specials=(
            *("<|im_start|>", "<|media_begin|>", "<|media_content|>", "<|media_pad|>", "<|media_end|>"),
            "<|kimi_k25_video_placeholder|>",
        ),
    ),
    "muse_spark": Speech(
        image="<|patch|>",
        turn="<|header_start|>{role}<|header_end|>\n",
        close="<|eot|>",
        answer="<|header_start|>assistant<|header_end|>\n",
        bos="<|begin_of_text|>",
        pad="<|finetune_right_pad|>",
        eos="<|eot|>",
        opening="{{ bos_token }}",
        specials=(
            *("<|header_start|>", "<|header_end|>", "<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"),
            *("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"),
            *("<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>"),
        ),
    ),
}
