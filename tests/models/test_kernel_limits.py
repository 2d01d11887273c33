"""What kernels lack, found on models without weights, with the sizes of published ones."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from vgs.errors import ConfigError
from vgs.models.groups import PromptGroup
from vgs.models.kernel_limits import attention_gaps, check_kernel, usable_kernel
from vgs.models.packed import score_packed

FEW = {"num_hidden_layers": 2, "vocab_size": 64, "num_key_value_heads": 2}
KINDS = {"layer_types": ["sliding_attention", "full_attention"]}
SMALL = {**FEW, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
WIDE = hf.Gemma4TextConfig(**FEW, **KINDS)  # heads of 256 and 512
LATENT = hf.DeepseekV3Config(**{**SMALL, **EXPERTS, "num_key_value_heads": 4, "num_mtp_layers": 0})  # 192 and 128
PLAIN = hf.Qwen3Config(**SMALL, head_dim=128)
NARROW = hf.Qwen3Config(**SMALL, head_dim=8)
ODD = hf.Qwen3Config(**SMALL, head_dim=20)
CAPPED = hf.Gemma2Config(**SMALL, head_dim=64)
SINKS = hf.GptOssConfig(**SMALL, head_dim=64, num_local_experts=4)


def model_of(config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("config", "kernel", "dtype", "gap"),
    [
        (WIDE, "varlen", None, "heads of 512, and the kernel's are multiples of 8 up to 256"),
        (ODD, "varlen", None, "heads of 20, and"),
        (LATENT, "varlen", None, "heads of 192 for keys and 128 for values"),
        (CAPPED, "varlen", None, "cap attention scores at 50.0"),
        (SINKS, "varlen", None, "attention sinks"),
        (PLAIN, "varlen", torch.float32, "computes in float32, and the kernel in 16 bits alone"),
        (NARROW, "flex", None, "heads of 8, and the kernel's have at least 16"),
        (PLAIN, "flex", torch.float64, "computes in float64"),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_a_gap_is_named(config: PreTrainedConfig, kernel: str, dtype: torch.dtype | None, gap: str) -> None:
    model = model_of(config)
    assert gap in attention_gaps(model, kernel, dtype)
    assert attention_gaps(model, "dense", dtype) is None
    match = (
        rf'^packed_attention="{kernel}" cannot run model, a {type(model).__name__}: it.*{gap}.* Use "auto" or "dense"'
    )
    with pytest.raises(ConfigError, match=match):
        check_kernel("model", model, kernel, "cuda", dtype)
    check_kernel("model", model, kernel, "cpu", dtype)


@pytest.mark.parametrize(
    ("config", "chosen"),
    [(PLAIN, "auto"), (WIDE, "flex"), (LATENT, "flex"), (CAPPED, "flex"), (SINKS, "flex"), (NARROW, "dense")],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_another_kernel_is_chosen(config: PreTrainedConfig, chosen: str) -> None:
    model = model_of(config)
    assert usable_kernel(model, "auto", "cuda") == chosen
    assert usable_kernel(model, "auto", "cpu") == "auto"
    assert usable_kernel(model, "varlen", "cuda") == "varlen"


def test_dropout_counts_in_training() -> None:
    model = model_of(hf.Qwen3Config(**SMALL, head_dim=64, attention_dropout=0.1))
    assert usable_kernel(model, "auto", "cuda") == "auto"
    assert usable_kernel(model.train(), "auto", "cuda") == "dense"
    for kernel in ("flex", "varlen"):
        assert "dropout of 0.1" in attention_gaps(model, kernel)


def test_packed_rows_take_the_chosen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vgs.models.packed.usable_kernel", lambda model, kernel, device: "another")
    ids = torch.tensor([1, 2, 3])
    groups = [PromptGroup(ids, ids, (torch.tensor([4, 5]),), {})]
    with pytest.raises(ValueError, match="got 'another'"):
        score_packed(AutoModelForCausalLM.from_config(ODD), groups, False, [True], torch.device("cpu"))
