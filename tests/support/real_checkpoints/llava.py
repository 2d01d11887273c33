"""LLaVA and its relatives: an encoder of pictures of one size, or Pixtral."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

from .common import PATCH, PINPOINTS, SIDE, Ids, Options, Recipe, latent, square, vision
from .texts import SPEECH as USUAL_SPEECH
from .texts import Speech


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


#: Yarn, and queries that grow with their place in the sequence, here from the eighth token on.
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 128.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "llama_4_scaling_beta": 0.9,
}


def _ministral3_text(text: Options, tie: bool) -> PreTrainedConfig:
    return hf.Ministral3Config(**text, rope_parameters=dict(GROWING), tie_word_embeddings=tie)


def _mistral4_text(text: Options, tie: bool) -> PreTrainedConfig:
    return hf.Mistral4Config(**{**latent(text), "head_dim": 16}, rope_parameters=dict(GROWING), tie_word_embeddings=tie)


def _mistral3(text_config: Callable[[Options, bool], PreTrainedConfig], text: Options, ids: Ids, tie: bool) -> Any:
    return hf.Mistral3Config(
        text_config=text_config(text, tie),
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


def _granite4_vision(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    scales = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7}
    encoder = hf.SiglipVisionConfig(**vision(hidden_size=64), vision_use_head=False)
    widths = {"hidden_size": 64, "encoder_hidden_size": 64, "intermediate_size": 32, "cross_attention_frequency": 1}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 1, "attention_probs_dropout_prob": 0.0}
    return hf.Granite4VisionConfig(
        text_config={**text, **scales, "attention_multiplier": 0.25, "tie_word_embeddings": tie},
        vision_config=encoder,
        qformer_config={"model_type": "blip_2_qformer", **widths, **layers},
        projector_dropout=0.0,
        vision_feature_select_strategy="full",
        image_token_index=ids["<image>"],
        image_grid_pinpoints=PINPOINTS,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1, 1, 1, 1],
        tie_word_embeddings=tie,
    )


def _deepseek_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.DeepseekVLConfig(
        text_config=hf.LlamaConfig(**text, tie_word_embeddings=tie),
        vision_config=hf.SiglipVisionConfig(**vision(), vision_use_head=False),
        image_token_id=ids["<image_placeholder>"],
        tie_word_embeddings=tie,
    )


def _janus(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    sizes = {name: value for name, value in vision().items() if name != "intermediate_size"}
    codes = {"embed_dim": 4, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}
    return hf.JanusConfig(
        text_config=hf.LlamaConfig(**text, tie_word_embeddings=tie),
        vision_config={**sizes, "mlp_ratio": 1.5, "projection_dim": text["hidden_size"], "num_image_tokens": 16},
        vq_config={
            **codes,
            "channel_multiplier": [1, 1],
            "projection_dim": 16,
            "image_token_embed_dim": text["hidden_size"],
        },
        image_token_id=ids["<image_placeholder>"],
        tie_word_embeddings=tie,
    )


def _pinpoint_processor(name: str, **options: Any) -> Callable[[Any], ProcessorMixin]:
    """Pictures as a whole and in tiles, on one of ``PINPOINTS``."""

    def build(tokenizer: Any) -> ProcessorMixin:
        size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
        images = hf.LlavaNextImageProcessor(size=size, crop_size=crop, image_grid_pinpoints=PINPOINTS)
        template = tokenizer.chat_template
        return getattr(hf, name)(images, tokenizer, patch_size=PATCH, chat_template=template, **options)

    return build


def _square_processor(family: str) -> Callable[[Any], ProcessorMixin]:
    """Pictures of one size, with as many tokens as they have patches."""

    def build(tokenizer: Any) -> ProcessorMixin:
        images = getattr(hf, f"{family}ImageProcessor")(**square())
        tokens = (SIDE // PATCH) ** 2
        return getattr(hf, f"{family}Processor")(images, tokenizer, tokenizer.chat_template, num_image_tokens=tokens)

    return build


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
    "mistral3": Recipe(partial(_mistral3, _mistral_text), _pixtral_processor(2)),
    "ministral3": Recipe(partial(_mistral3, _ministral3_text), _pixtral_processor(2)),
    "mistral4": Recipe(partial(_mistral3, _mistral4_text), _pixtral_processor(2)),
    "granite4_vision": Recipe(
        _granite4_vision,
        _pinpoint_processor("Granite4VisionProcessor", vision_feature_select_strategy="full", downsample_rate="1/2"),
    ),
    "deepseek_vl": Recipe(_deepseek_vl, _square_processor("DeepseekVL")),
    "janus": Recipe(_janus, _square_processor("Janus")),
    "llava_next": Recipe(
        _llava_next,
        _pinpoint_processor(
            "LlavaNextProcessor", vision_feature_select_strategy="default", num_additional_image_tokens=1
        ),
    ),
    "llava_onevision": Recipe(_llava_onevision, _llava_onevision_processor),
}
_DEEPSEEK = Speech(
    image="<image_placeholder>",
    turn="{role}: ",
    close="\n\n",
    answer="Assistant:",
    bos="<s>",
    pad="<pad>",
    named={"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"},
    roles={"user": "User", "assistant": "Assistant", "system": "System"},
    adds_bos=True,
)
SPEECH = {
    "ministral3": USUAL_SPEECH["mistral3"],
    "mistral4": USUAL_SPEECH["mistral3"],
    "granite4_vision": Speech(
        image="<image>",
        turn="<|start_of_role|>{role}<|end_of_role|>",
        close="<|end_of_text|>\n",
        answer="<|start_of_role|>assistant<|end_of_role|>",
        eos="<|end_of_text|>",
        specials=("<|start_of_role|>", "<|end_of_role|>"),
        named={"image_token": "<image>"},
        images_first=True,
    ),
    "deepseek_vl": _DEEPSEEK,
    "janus": _DEEPSEEK,
}
