"""A tiny model and the real processor of every family, as their published checkpoints pair them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import transformers as hf
from transformers import PreTrainedConfig, ProcessorMixin

SIDE, PATCH = 32, 8  # pixels: the side of an encoder's picture, and of its patches
MERGED = (SIDE // PATCH // 2) ** 2  # tokens of such a picture where two by two patches make one token
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
WINDOW = 8  # of sliding attention: shorter than a prompt

Ids = Mapping[str, int]
Options = dict[str, Any]


class Recipe(NamedTuple):
    """Builds a family's config and processor.

    Attributes:
        config: ``config(text, ids, tie)`` with the text options that all families share and the ids of the tokens.
        processor: ``processor(tokenizer)``.
    """

    config: Callable[[Options, Ids, bool], PreTrainedConfig]
    processor: Callable[[Any], ProcessorMixin]


def _vision(**options: Any) -> Options:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": SIDE, "patch_size": PATCH, **options}


def _square(**options: Any) -> Options:
    return {"size": {"height": SIDE, "width": SIDE}, **options}


def _special_ids(ids: Ids) -> Options:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: ids[token] for name, token in names.items()}


# ---- Qwen


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
        **_special_ids(ids),
    )


def _qwen2_5_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": PATCH}
    windows = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLConfig(
        text_config={**text, **_rope([4, 2, 2])},
        vision_config={**vision, **windows, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tie,
        **_special_ids(ids),
    )


def _qwen3_vision(text: Options) -> Options:
    sizes = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": PATCH}
    return {**sizes, "out_hidden_size": text["hidden_size"], "num_position_embeddings": 64}


def _qwen3_vl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Qwen3VLConfig(
        text_config={**text, **_rope([4, 2, 2], mrope_interleaved=True)},
        vision_config={**_qwen3_vision(text), "deepstack_visual_indexes": [0]},
        tie_word_embeddings=tie,
        **_special_ids(ids),
    )


def _qwen3_5(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"],
    }
    rope = _rope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5)
    return hf.Qwen3_5Config(
        text_config={**text, **linear, **rope, "tie_word_embeddings": tie},
        vision_config=_qwen3_vision(text),
        tie_word_embeddings=tie,
        **_special_ids(ids),
    )


# ---- LLaVA


def _llava(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.LlavaConfig(
        text_config=hf.LlamaConfig(**text, tie_word_embeddings=tie),
        vision_config=hf.CLIPVisionConfig(**_vision()),
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
        vision_config=hf.PixtralVisionConfig(**_vision(image_size=2 * SIDE)),
        image_token_id=ids["[IMG]"],
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=tie,
    )


def _mistral3(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Mistral3Config(
        text_config=_mistral_text(text, tie),
        vision_config=hf.PixtralVisionConfig(**_vision(image_size=2 * SIDE)),
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
        vision_config=hf.CLIPVisionConfig(**_vision()),
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
        vision_config=hf.SiglipVisionConfig(**_vision(), vision_use_head=False),
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tie,
    )


def _llava_onevision_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(**_square(image_grid_pinpoints=PINPOINTS)),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(**_square()),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


# ---- tiles


def _internvl(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    vision = _vision(image_size=(SIDE, SIDE), patch_size=(PATCH, PATCH))
    return hf.InternVLConfig(
        text_config=hf.Qwen2Config(**text, tie_word_embeddings=tie),
        vision_config=vision,
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=MERGED,
        tie_word_embeddings=tie,
    )


def _internvl_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(**_square(crop_to_patches=True, min_patches=1, max_patches=4)),
        tokenizer,
        hf.InternVLVideoProcessor(**_square()),
        image_seq_length=MERGED,
        chat_template=tokenizer.chat_template,
    )


def _idefics(config: str, vision: str) -> Callable[[Options, Ids, bool], PreTrainedConfig]:
    def build(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
        return getattr(hf, config)(
            text_config=hf.LlamaConfig(**text, tie_word_embeddings=tie),
            vision_config={"model_type": vision, **_vision()},
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
        vision_config=hf.SiglipVisionConfig(**_vision(), vision_use_head=False),
        image_token_id=ids["<|IMG_PATCH|>"],
        tie_word_embeddings=tie,
    )


def _aya_processor(tokenizer: Any) -> ProcessorMixin:
    return hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessor(**_square(crop_to_patches=True, min_patches=1, max_patches=4)),
        tokenizer,
        patch_size=PATCH,
        img_size=SIDE,
        downsample_factor=2,
        chat_template=tokenizer.chat_template,
    )


def _cohere2_vision(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    return hf.Cohere2VisionConfig(
        text_config=_cohere_text(text, tie),
        vision_config=hf.SiglipVisionConfig(**_vision(), vision_use_head=False),
        image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=64,
        tie_word_embeddings=tie,
    )


def _cohere2_processor(tokenizer: Any) -> ProcessorMixin:
    # This processor takes the square of ``patch_size`` for the number of tokens of a tile.
    images = hf.Cohere2VisionImageProcessor(**_square(max_patches=4, patch_size=int(MERGED**0.5)))
    return hf.Cohere2VisionProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


# ---- Gemma


def _gemma3(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    kinds = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return hf.Gemma3Config(
        text_config={**text, **kinds, "query_pre_attn_scalar": 16, "tie_word_embeddings": tie},
        vision_config=_vision(vision_use_head=False),
        mm_tokens_per_image=MERGED,
        image_token_id=ids["<image_soft_token>"],
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        tie_word_embeddings=tie,
    )


def _gemma3_processor(tokenizer: Any) -> ProcessorMixin:
    images = hf.Gemma3ImageProcessor(**_square())
    return hf.Gemma3Processor(images, tokenizer, image_seq_length=MERGED, chat_template=tokenizer.chat_template)


def _gemma4(text: Options, ids: Ids, tie: bool) -> PreTrainedConfig:
    kinds = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    layers = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": text["vocab_size"], "global_head_dim": 16}
    soft = {"final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision", "tie_word_embeddings": tie}
    heads = {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 256}
    vision = {name: value for name, value in _vision(patch_size=4, **heads).items() if name != "image_size"}
    return hf.Gemma4Config(
        text_config={**text, **kinds, **layers, **soft},
        vision_config=vision,
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
    "qwen2_vl": Recipe(_qwen2_vl, _qwen_processor("Qwen2VLProcessor")),
    "qwen2_5_vl": Recipe(_qwen2_5_vl, _qwen_processor("Qwen2_5_VLProcessor")),
    "qwen3_vl": Recipe(_qwen3_vl, _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")),
    "qwen3_5": Recipe(_qwen3_5, _qwen_processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor")),
    "internvl": Recipe(_internvl, _internvl_processor),
    "llava": Recipe(_llava, _llava_processor),
    "llava_pixtral": Recipe(_pixtral, _pixtral_processor(1)),
    "mistral3": Recipe(_mistral3, _pixtral_processor(2)),
    "llava_next": Recipe(_llava_next, _llava_next_processor),
    "llava_onevision": Recipe(_llava_onevision, _llava_onevision_processor),
    "gemma3": Recipe(_gemma3, _gemma3_processor),
    "gemma4": Recipe(_gemma4, _gemma4_processor),
    "smolvlm": Recipe(_idefics("SmolVLMConfig", "smolvlm_vision"), _smolvlm_processor),
    "idefics3": Recipe(_idefics("Idefics3Config", "idefics3_vision"), _idefics3_processor),
    "aya_vision": Recipe(_aya, _aya_processor),
    "cohere2_vision": Recipe(_cohere2_vision, _cohere2_processor),
}
