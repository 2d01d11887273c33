"""Tiny random text models whose layers carry a state from token to token, in float64, and prompts for them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from families import shaken
from torch import Tensor, nn

from vgs.models.groups import PromptGroup

VOCABULARY = 60
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
MAMBA = {
    "layers_block_type": ["linear_attention", "full_attention", "linear_attention"],
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 32,
    "head_dim": 16,
    "time_step_min": 0.05,  # a step of padding would show
}
SCAN = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 32,
}
KIMI = {
    "linear_num_heads": 2,
    "linear_head_dim": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "qwen3_5": lambda: hf.Qwen3_5TextConfig(**TEXT, **LINEAR),
    "qwen3_5_moe": lambda: hf.Qwen3_5MoeTextConfig(**_without(TEXT, "intermediate_size"), **LINEAR, **EXPERTS),
    "qwen3_next": lambda: hf.Qwen3NextConfig(**TEXT, **LINEAR, **EXPERTS),
    "lfm2": lambda: hf.Lfm2Config(**TEXT, **CONV, conv_bias=True),
    "nemotron_h": lambda: hf.NemotronHConfig(**_without(TEXT, "num_hidden_layers"), **MAMBA),
    "kimi_linear": lambda: hf.KimiLinearConfig(
        **{**TEXT, "num_key_value_heads": 2, "layer_types": LINEAR["layer_types"]}, **KIMI, **EXPERTS
    ),
}
if hasattr(hf, "Lfm3Config"):  # not in the oldest library
    CONFIGS["lfm3"] = lambda: hf.Lfm3Config(**TEXT, layer_types=["conv", "sliding_attention", "conv"], head_dim=16)
#: Of the same functions, by other families.
OTHERS: dict[str, Callable[[], hf.PreTrainedConfig]] = {
    "olmo_hybrid": lambda: hf.OlmoHybridConfig(**TEXT, **{**_without(LINEAR, "head_dim"), "linear_num_value_heads": 2}),
    "lfm2_moe": lambda: hf.Lfm2MoeConfig(**TEXT, **CONV, **_without(EXPERTS, "shared_expert_intermediate_size")),
    "bamba": lambda: hf.BambaConfig(**TEXT, **SCAN, attn_layer_indices=[1]),
    "falcon_h1": lambda: hf.FalconH1Config(**TEXT, **SCAN, mamba_d_ssm=64),
    "granitemoehybrid": lambda: hf.GraniteMoeHybridConfig(
        **TEXT, **SCAN, layer_types=["mamba", "attention", "mamba"], num_local_experts=2, num_experts_per_tok=1
    ),
}


class _Double:
    """``torch``, where the library's float32 is float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def compute_in_float64(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> nn.Module:
    """The model in float64, with modeling files that compute in float64 where they compute in float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for name in {type(module).__module__ for module in model.modules()}:
        if name.startswith("transformers.models."):
            monkeypatch.setattr(sys.modules[name], "torch", _Double(), raising=False)
    return model.double()


def text_model(stack: str) -> nn.Module:
    """A random model in float32."""
    torch.manual_seed(0)
    config = {**CONFIGS, **OTHERS}[stack]()
    options = {"attn_implementation": "sdpa", "experts_implementation": "eager"}
    return shaken(hf.AutoModelForCausalLM.from_config(config, **options))


def text_groups() -> list[PromptGroup]:
    """Prompts shorter than the taps of a convolution and longer than two chunks, with responses of all lengths."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> Tensor:
        return torch.randint(1, VOCABULARY, (count,), generator=generator)

    lengths = [(1, [3, 2]), (150, [0, 1, 2, 70]), (2, [5]), (64, [66, 4]), (9, [2, 9, 1])]
    return [
        PromptGroup(prompt, prompt[-1 - len(prompt) // 3 :], tuple(words(n) for n in responses), {})
        for prompt, responses in ((words(count), responses) for count, responses in lengths)
    ]
