"""Families with real checkpoints in packed rows: equal to plain forwards, with checkpointing and frozen parts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import transformers
from covering import slow_beyond
from families import assert_same_gradients, gradients_of, separate, shaken
from real_checkpoints import REAL_FAMILIES, photo_samples
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma2Config,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    PreTrainedConfig,
)

import vgs
from vgs.errors import ConfigError
from vgs.models.families import freeze, placeholder_ids
from vgs.models.groups import PromptGroup
from vgs.models.self_check import packs

Checkpoint = Callable[..., Path]
RESPONSES = [[[70, 71, 72], [80, 81, 82, 83, 84]], [[90, 91], [73, 74, 75, 76]], [[100], [75, 76, 77]]]
#: Those that run every time: each has something in its layers that the others have not.
USUAL = ("qwen3_vl_moe", "glm4v_moe", "kimi_k25", "ovis2", "granite4_vision", "mistral4", "gemma4_small", "gemma4_moe")
#: Those whose layers carry a state from token to token.
CARRYING = ("qwen3_5",)
PACKED = slow_beyond(USUAL, (x for x in REAL_FAMILIES if x not in CARRYING))


def loaded(folder: Path) -> nn.Module:
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


def groups_of(folder: Path, model: nn.Module, photos: Path) -> list[PromptGroup]:
    """One image, two, none, with two responses each."""
    processor = AutoProcessor.from_pretrained(folder)
    return vgs.encode_groups(processor, photo_samples(photos), RESPONSES, placeholder_ids(model.config))


def gemma3n_text() -> nn.Module:
    """A text model, for its tower needs a library of its own (timm)."""
    kinds = ["sliding_attention", "full_attention"] * 2
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    tables = {"vocab_size": 128, "vocab_size_per_layer_input": 120, "hidden_size_per_layer_input": 8}
    layers = {"num_hidden_layers": 4, "layer_types": kinds, "num_kv_shared_layers": 2, "sliding_window": 8}
    config = Gemma3nTextConfig(**sizes, **tables, **layers, head_dim=16, laurel_rank=4, altup_num_inputs=2)
    return shaken(Gemma3nForCausalLM(config))


def text_groups() -> list[PromptGroup]:
    """Two prompts without images, with two responses each."""
    prompts = [torch.arange(1, 1 + length) for length in (12, 20)]
    answers = (torch.tensor([40, 41, 42, 43]), torch.tensor([50, 51]))
    return [PromptGroup(ids, ids, answers, {}) for ids in prompts]


def assert_close(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for rows, oracle in zip(actual, expected, strict=True):
        assert (rows - oracle).abs().max() <= 1e-5 * oracle.abs().max()


@pytest.mark.parametrize("family", PACKED)
def test_packed_rows_equal_plain_forwards(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Both views, every parameter's gradient through shared prompts, and the same through gradient checkpointing."""
    folder = checkpoint(family)
    model, plain = loaded(folder), loaded(folder)
    groups = groups_of(folder, model, tmp_path)
    assert packs(model, groups)
    oracle = separate(plain, groups)
    expected = gradients_of(plain, oracle)
    assert any("vis" in name for name in expected)
    for checkpointing in (False, True):
        if checkpointing:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        rows = vgs.score_groups(model, groups)
        assert_close(rows, oracle)
        assert_same_gradients(gradients_of(model, rows), expected, 2e-5)


def test_the_text_model_of_gemma_3n_packs() -> None:
    model, plain, groups = gemma3n_text(), gemma3n_text(), text_groups()
    assert packs(model, groups)
    oracle = separate(plain, groups)
    rows = vgs.score_groups(model, groups)
    assert_close(rows, oracle)
    assert_same_gradients(gradients_of(model, rows), gradients_of(plain, oracle), 2e-5)


SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "head_dim": 16}
LAYERS = {"num_hidden_layers": 2, "num_key_value_heads": 1, "sliding_window": 8}
CAPPED = Gemma2Config(**SIZES, **LAYERS, attn_logit_softcapping=1.0, query_pre_attn_scalar=16)
SINKS = GptOssConfig(**SIZES, **LAYERS, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize("config", [CAPPED, SINKS], ids=["capped scores", "sinks"])
def test_attention_that_sdpa_has_not(config: PreTrainedConfig) -> None:
    """Eager attention, packed, and in plain forwards of the same model afterwards."""
    model = shaken(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    groups = text_groups()
    plain = copy.deepcopy(model)
    assert packs(model, groups)
    oracle = separate(plain, groups)
    rows = vgs.score_groups(model, groups)
    assert_close(rows, oracle)
    assert_same_gradients(gradients_of(model, rows), gradients_of(plain, oracle), 2e-5)
    assert_close(separate(model, groups), oracle)
    plain.config.attn_logit_softcapping = None  # otherwise the comparison would mean nothing
    for layer in plain.model.layers:
        layer.self_attn.attn_logit_softcapping = None
        layer.self_attn.sinks = nn.Parameter(torch.full((2,), -100.0))
    assert (separate(plain, groups)[0] - oracle[0]).abs().max() > 1e-2


@pytest.mark.parametrize("family", slow_beyond(USUAL, (x for x in REAL_FAMILIES if x != "gemma4_unified")))
def test_the_tower_is_frozen_and_the_text_model_not(family: str, checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint(family))
    freeze(model, vision=True)
    body = model.base_model
    frozen = {name for name, p in body.named_parameters() if not p.requires_grad}
    roots = {name.split(".")[0] for name in frozen}
    assert len(roots) == 1 and roots <= {"visual", "vision_tower", "vision_model"}
    (root,) = roots
    assert all(not p.requires_grad for p in getattr(body, root).parameters())


def test_a_family_without_a_tower_says_so(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ConfigError, match=r"^freeze_vision is true, but Gemma4Unified\w+ has no vision tower: .*false\.$"
    ):
        freeze(loaded(checkpoint("gemma4_unified")), vision=True)


@pytest.mark.parametrize("family", slow_beyond(USUAL, REAL_FAMILIES))
def test_every_table_of_tokens_is_frozen(family: str, checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint(family, teacher=True))
    freeze(model, embeddings=True)
    left = {name for name, p in model.base_model.get_decoder().named_parameters() if p.requires_grad}
    assert left and not any("embed_tokens" in name for name in left)
    assert model.get_output_embeddings().weight.requires_grad


def test_a_smaller_table_is_frozen_too() -> None:
    """Gemma 3n's table for all layers leaves out the tokens of pictures and sounds."""
    model = gemma3n_text()
    freeze(model, embeddings=True)
    assert not model.model.embed_tokens_per_layer.weight.requires_grad
    assert all(p.requires_grad for p in model.model.layers.parameters())


def test_a_table_of_several_tokens_is_frozen_too() -> None:
    """Qwen 4 looks up words of two and three tokens."""
    pairs = {"ple_layer_ids": [1], "ple_embed_dim": 32, "ngram_vocab_size_base": 500, "split_ngram_parts": 1}
    indexer = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16}
    text = {**SIZES, "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 2}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    text |= {**pairs, **indexer, "indexer_compress_ratio": 4}
    config = transformers.Qwen4ExpConfig(text_config=text, vision_config=vision)
    with torch.device("meta"):
        model = transformers.Qwen4ExpForConditionalGeneration(config)
    freeze(model, embeddings=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 and any("ngram_embedding" in name for name in frozen)
