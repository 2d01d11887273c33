"""What a tiny model of a family needs beside what all need: fields of its config, options of its image processor.

Default configs and default image processors are not made for each other; where sizes must agree, they are written here.
"""

from __future__ import annotations

from typing import Any

SIDE = 64  # pixels of the picture, and of what an encoder of one size takes
PATCH, MERGED = 16, 4  # pixels of a patch; tokens of a picture where two by two patches make one token

_PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SECTIONS = {"text_config.rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12], "partial_rotary_factor": 0.5}}
_CODES = {
    "embed_dim": 16,
    "latent_channels": 16,
    "base_channels": 32,
    "channel_multiplier": [1, 1, 1, 2],
    "num_res_blocks": 1,
}
_TILES = {"image_grid_pinpoints": _PINPOINTS}
_PATCHES = {"vision_config.image_size": SIDE, "vision_config.patch_size": 16}


def _letters(number: int) -> str:
    return "".join(chr(ord("A") + int(digit)) for digit in str(number))


#: What a config is built with, where the default one lacks something or cannot be made small afterwards.
GIVEN: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "image_token_offset": 200,
        "audio_token_offset": 264,
        "vision_config": {**_CODES, "channel_multiplier": [1, 1, 1, 1, 2], "codebook_size": 64},
        "audio_config": {"num_filters": 4, "hidden_size": 64, "codebook_dim": 64, "codebook_size": 64},
    },
    "aria": {"projector_patch_to_query_dict": {1225: 4}},
    "chameleon": {
        "vq_config": {**_CODES, "num_embeddings": 64, "resolution": SIDE},
        "vocabulary_map": {"<image>": 90, **{f"IMGIMG{_letters(code)}Z": 200 + code for code in range(64)}},
    },
    "cohere_compass": {
        "text_config": {
            "rope_parameters": {
                kind: {**_ROPE, "mrope_section": [24, 20, 20]} for kind in ("full_attention", "sliding_attention")
            }
        }
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_hidden_layers": 2, "num_experts_per_tok": 2}
    },
    "emu3": {
        "vq_config": {**_CODES, "codebook_size": 64, "hidden_size": 64},
        "vocabulary_map": {
            "<image>": 90,
            "<|extra_200|>": 91,
            **{f"<|visual token {code:06d}|>": 200 + code for code in range(64)},
        },
    },
    "gemma4": {"vision_config": {}},
    "gemma4_unified": {"vision_config": {}},
    "granite4_vision": {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
        "vision_feature_select_strategy": "full",
    },
    "hunyuan_vl": {"text_config": {"head_dim": 128, "rope_parameters": {**_ROPE, "mrope_section": [16, 16, 16, 16]}}},
}

GIVEN["perception_lm"] = {
    "vision_config": {
        "architecture": "vit_pe_core_large_patch14_336",
        "model_args": {
            "embed_dim": 256,
            "img_size": (56, 56),
            "depth": 2,
            "num_heads": 4,
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": (4, 4),
        },
    }
}

#: family -> dotted name of a field -> its value in the tiny config.
FIELDS: dict[str, dict[str, Any]] = {
    "aria": {"vision_config.image_size": 490, "vision_config.patch_size": 14},
    "chameleon": {"image_token_id": 90},
    "deepseek_ocr2": {"vision_config.sam_config.downsample_channels": [64, 256]},
    "deepseek_vl_hybrid": {
        "high_res_vision_config.global_attn_indexes": [1],
        "high_res_vision_config.image_size": SIDE,
        "high_res_vision_config.patch_size": 4,
    },
    "dots3_note": {"vision_config.adapter_in_dim": 256},
    "emu3": {"image_token_id": 90},
    "gemma3": {"mm_tokens_per_image": 4, **_PATCHES},
    "fast_vlm": {"vision_config.hidden_size": 3072},
    "gemma3n": {"vision_config.hidden_size": 2048},
    "gemma4_unified": {"vision_config.output_proj_dims": 256},
    "glm46v": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm4v_moe": _SECTIONS,
    "glm_ocr": _SECTIONS,
    "glmga": _SECTIONS,
    "granite4_vision": {**_TILES, **_PATCHES, "qformer_config.hidden_size": 256},
    "llama4": {"vision_config.intermediate_size": 1024, "vision_config.projector_input_dim": 256},
    "llava_next": {**_TILES, **_PATCHES},
    "llava_next_video": {**_TILES, **_PATCHES},
    "llava_onevision": {**_TILES, **_PATCHES},
    "minicpm_ocr": {"image_token_id": 90, "insert_layer_id": 0, "vision_config.image_size": 4 * SIDE},
    "minicpmv4_6": {"image_token_id": 90, "insert_layer_id": 0, "vision_config.image_size": 4 * SIDE},
    "minicpmv4_7": {"image_token_id": 90, "insert_layer_id": 0, "vision_config.image_size": 4 * SIDE},
    "minimax_m3_vl": {"merged_hidden_size": 1024},
    "molmo2": {
        "vision_config.image_size": [SIDE, SIDE],
        "vision_config.patch_size": 16,
        "vision_config.num_position_embeddings": 16,
    },
    "muse_glimmer": {"out_hidden_size": 1024},
    "muse_spark": {"out_hidden_size": 1024},
    "nemotron_h_omni": {"image_token_id": 90},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 92, "audio_start_token_id": 93},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 92, "audio_start_token_id": 93},
    "shieldgemma2": {"mm_tokens_per_image": 4, **_PATCHES},
    "step3p7": {"text_config.sliding_window": 24},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [64, 256]},
}

_FORTY = {"size": {"height": 40, "width": 40}}
_PINNED = {"image_grid_pinpoints": _PINPOINTS}
#: family -> options of its image processor, beside those that ``survey_models`` finds out.
OPTIONS: dict[str, dict[str, Any]] = {
    "apertus1p5": {"size": {"min_pixels": SIDE**2, "max_pixels": SIDE**2}},
    "aria": {"max_image_size": 490},
    "dots3_note": {"temporal_patch_size": 1},
    "emu3": {"min_pixels": SIDE**2, "max_pixels": SIDE**2},
    "gemma4": {"max_soft_tokens": 70},
    "gemma4_unified": {"max_soft_tokens": 70},
    "granite4_vision": _PINNED,
    "inkling2": _FORTY,
    "inkling2_loop": _FORTY,
    "inkling_mm_model": _FORTY,
    "llava_next": _PINNED,
    "llava_next_video": _PINNED,
    "llava_onevision": _PINNED,
    "perception_lm": {"tile_size": 56, "max_num_tiles": 4},
    "molmo2": {"size": {"height": SIDE, "width": SIDE}, "max_crops": 4, "overlap_margins": [1, 1]},
    "minicpm_ocr": {"scale_resolution": SIDE, "max_slice_nums": 4},
    "minicpmv4_6": {"scale_resolution": SIDE, "max_slice_nums": 4},
    "minicpmv4_7": {"scale_resolution": SIDE, "max_slice_nums": 4},
    "nemotron_h_omni": {"min_num_patches": 4, "max_num_patches": 64},
    "lfm2_vl": {"tile_size": SIDE, "min_image_tokens": 4, "max_image_tokens": 16, "max_tiles": 4},
}

#: Why a family does not run in packed rows, or is not tried, where the error or the numbers alone do not say it.
REASONS: dict[str, str] = {
    "diffusion_gemma": "it writes blocks of text by diffusion, not one token after the other",
    "dots3_note": "its sparse attention narrows the mask itself",
    "git": "its attention adds the mask to one of its own",
    "glm5_next": "its sparse attention chooses among pools of tokens that it forms along the whole row",
    "hy_v4_vl": "its sparse attention narrows the mask itself",
    "inkling2": "its attention adds biases for distances, one for every pair of places in the row",
    "inkling2_loop": "its attention adds biases for distances, one for every pair of places in the row",
    "inkling_mm_model": "its attention adds biases for distances, one for every pair of places in the row",
    "kosmos-2.5": "the first token has position 2 in its own forward, and 0 where positions are passed",
    "llama4": "layers without rotary embedding scale queries by their place in the row",
    "mistral_large4": "its sparse attention narrows the mask itself",
    "molmo2": "it joins the mask with one of its own",
    "paligemma": "its prompts attend in both directions, and so do its responses where no token types say otherwise",
    "qwen4_exp": "its default config does not say how large its indexer is",
    "pi0": "it predicts the actions of a robot, not tokens",
}
