"""The small copy on which a family is asked: which layers stay, how long windows are, and whether there is room."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES
from transformers import (
    Gemma4TextConfig,
    Llama4TextConfig,
    LlavaForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3MoeConfig,
)

from vgs.models.shallow import shallow_config, shallow_copy
from vgs.models.survey_models import SURVEYED

CPU = torch.device("cpu")


def test_a_copy_has_one_layer_of_each_kind_and_short_windows() -> None:
    qwen = shallow_config(Qwen3_5TextConfig())
    assert qwen.layer_types == ["linear_attention", "linear_attention", "full_attention"]
    gemma = Gemma4TextConfig(num_hidden_layers=42, num_kv_shared_layers=18)
    short = shallow_config(gemma)
    kinds = ["sliding_attention", "full_attention"]
    assert short.layer_types == ["sliding_attention", *kinds, *kinds], "with their own keys and values, and with shared"
    assert short.num_kv_shared_layers == 2 and short.sliding_window == 24
    assert gemma.num_hidden_layers == 42 and gemma.sliding_window > 24, "the original stays"
    moe = shallow_config(Qwen3MoeConfig(num_hidden_layers=8, decoder_sparse_step=2, num_experts=128))
    assert moe.num_hidden_layers == 2 and moe.mlp_only_layers == [0] and moe.num_experts == 16
    llama = shallow_config(Llama4TextConfig(num_hidden_layers=48, interleave_moe_layer_step=2))
    assert llama.moe_layers == [1, 2] and llama.no_rope_layers == [1, 1, 0], "numbers of layers are those that are kept"
    if "mistral_large4" not in SURVEYED:  # it came after the oldest library
        return
    mistral = shallow_config(
        transformers.MistralLarge4TextConfig(kv_source_layers=[max(i, 0) if i < 70 else 68 for i in range(72)])
    )
    assert mistral.num_hidden_layers < 10 and len(mistral.kv_source_layers) == mistral.num_hidden_layers


def test_memory_that_files_occupy_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "meminfo"
    monkeypatch.setattr("vgs.models.shallow.MEMORY", memory)
    config = FAMILIES["llava"].build().config
    memory.write_text("MemTotal: 9000000 kB\nMemFree:  10 kB\nMemAvailable:  4000000 kB\n")
    assert shallow_copy(LlavaForConditionalGeneration, config, CPU) is not None
    memory.write_text("MemTotal: 9000000 kB\nMemFree:  10 kB\nMemAvailable:  10 kB\n")
    with pytest.raises(MemoryError, match=r"^it needs 0.0 GiB on cpu, of which 0.0 are free$"):
        shallow_copy(LlavaForConditionalGeneration, config, CPU)
