"""What the recipes of tiny models and real processors share, one recipe a family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedConfig, ProcessorMixin

SIDE, PATCH = 32, 8  # pixels: the side of an encoder's picture, and of its patches
MERGED = (SIDE // PATCH // 2) ** 2  # tokens of such a picture where two by two patches make one token
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
WINDOW = 8  # of sliding attention: shorter than a prompt
#: Of a mixture of experts: two of them for every token.
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}

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


def vision(**options: Any) -> Options:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {**sizes, "image_size": SIDE, "patch_size": PATCH, **options}


def square(**options: Any) -> Options:
    return {"size": {"height": SIDE, "width": SIDE}, **options}


def special_ids(ids: Ids) -> Options:
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {name: ids[token] for name, token in names.items()}


def latent(text: Options) -> Options:
    """Options of a text model with DeepSeek's latent attention and its mixture of experts."""
    sizes = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    router = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    return {**text, **sizes, **router, **EXPERTS, "head_dim": 8, "num_key_value_heads": text["num_attention_heads"]}
