"""Pairs of models with text stacks of several kinds of layers: Qwen3.5 (linear attention) and Gemma 4 (windows).

Without the cap on logits that Gemma 4 has: the naive method, which all others are compared with, knows none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from transformers import Gemma4Config, Gemma4UnifiedConfig, PretrainedConfig, Qwen3_5Config


def _qwen3_5(
    hidden: int, intermediate: int, layers: int, heads: int, key_value: int, head: int, vocabulary: int,
    linear: tuple[int, int, int], tower: tuple[int, int, int, int, int], tied: bool, ids: int,
) -> Qwen3_5Config:  # fmt: skip
    """``linear``: key heads, value heads, head size; ``tower``: depth, width, inner width, heads, patch size."""
    keys, values, size = linear
    depth, width, inner, tower_heads, patch = tower
    quarter = head // 8
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_interleaved": True}
    return Qwen3_5Config(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_value,
            "head_dim": head,
            "linear_num_key_heads": keys,
            "linear_num_value_heads": values,
            "linear_key_head_dim": size,
            "linear_value_head_dim": size,
            "max_position_embeddings": 262_144,
            "rope_parameters": {**rope, "mrope_section": [quarter - 2 * (quarter // 3), quarter // 3, quarter // 3]},
            "tie_word_embeddings": tied,
        },
        vision_config={
            "depth": depth,
            "hidden_size": width,
            "intermediate_size": inner,
            "num_heads": tower_heads,
            "patch_size": patch,
            "out_hidden_size": hidden,
        },
        image_token_id=ids,
        video_token_id=ids - 1,
        vision_start_token_id=ids - 2,
        vision_end_token_id=ids - 3,
        tie_word_embeddings=tied,
    )


def _gemma4(
    hidden: int, intermediate: int, layers: int, heads: int, key_value: int, head: int, vocabulary: int,
    window: int, tables: int, shared: int, tower: tuple[int, int, int, int] | None, ids: int,
) -> PretrainedConfig:  # fmt: skip
    """``tables``: width of the per-layer embeddings; ``shared``: layers that take keys and values from those below;
    ``tower``: depth, width, inner width, patch size, or None for patches that enter the decoder at once."""
    period = 6 if layers % 6 == 0 and layers > 6 else 2  # layers of which one has no window
    text = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "head_dim": head,
        "global_head_dim": 2 * head,
        "sliding_window": window,
        "layer_types": ["sliding_attention" if (x + 1) % period else "full_attention" for x in range(layers)],
        "num_kv_shared_layers": shared,
    }
    marks = {name: ids - place for place, name in enumerate(("image_token_id", "video_token_id", "audio_token_id"))}
    marks |= {"boi_token_id": ids - 3, "eoi_token_id": ids - 4, "boa_token_id": ids - 5, "eoa_token_index": ids - 6}
    if tower is None:
        vision = {"patch_size": 16, "mm_embed_dim": hidden, "output_proj_dims": hidden}
        return Gemma4UnifiedConfig(text_config=text, vision_config=vision, **marks)
    depth, width, inner, patch = tower
    text |= {"hidden_size_per_layer_input": tables, "vocab_size_per_layer_input": vocabulary}
    return Gemma4Config(
        text_config=text,
        vision_config={
            "hidden_size": width,
            "intermediate_size": inner,
            "num_hidden_layers": depth,
            "num_attention_heads": width // 64 or 1,
            "num_key_value_heads": width // 64 or 1,
            "head_dim": min(width, 64),
            "patch_size": patch,
        },
        **marks,
    )


_TOWER, _GEMMA_TOWER = (2, 64, 128, 4, 8), (2, 64, 128, 8)
#: (student, teacher) by name: toys of the sizes of the others, and published shapes as far as they are known to us.
HYBRIDS: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[], PretrainedConfig]]] = {
    "small-qwen3.5": (
        partial(_qwen3_5, 96, 288, 4, 3, 3, 32, 2048, (3, 3, 32), _TOWER, True, 2047),
        partial(_qwen3_5, 128, 384, 4, 4, 4, 32, 2048, (4, 4, 32), _TOWER, False, 2047),
    ),
    "medium-qwen3.5": (
        partial(_qwen3_5, 256, 768, 4, 8, 8, 32, 8192, (8, 8, 32), _TOWER, True, 2047),
        partial(_qwen3_5, 512, 1536, 8, 16, 16, 32, 8192, (16, 16, 32), _TOWER, False, 2047),
    ),
    "small-gemma4": (
        partial(_gemma4, 96, 288, 4, 3, 1, 32, 2048, 16, 16, 2, _GEMMA_TOWER, 2047),
        partial(_gemma4, 128, 384, 4, 4, 2, 32, 2048, 16, 0, 0, _GEMMA_TOWER, 2047),
    ),
    "medium-gemma4": (
        partial(_gemma4, 256, 768, 4, 8, 2, 32, 8192, 64, 32, 2, _GEMMA_TOWER, 2047),
        partial(_gemma4, 512, 1536, 6, 16, 4, 32, 8192, 64, 0, 0, _GEMMA_TOWER, 2047),
    ),
    "qwen3.5-9b-4b": (
        partial(_qwen3_5, 2560, 9216, 32, 16, 4, 256, 248_320, (16, 32, 128), (24, 1024, 4096, 16, 16), True, 248_056),
        partial(
            _qwen3_5, 4096, 12_288, 32, 16, 4, 256, 248_320, (16, 32, 128), (27, 1152, 4304, 16, 16), False, 248_056
        ),
    ),
    "gemma4-12b-e4b": (
        partial(_gemma4, 2560, 10_240, 42, 8, 2, 256, 262_144, 512, 256, 18, (16, 768, 3072, 16), 258_880),
        partial(_gemma4, 3840, 15_360, 48, 16, 8, 256, 262_144, 1024, 0, 0, None, 258_880),
    ),
}
