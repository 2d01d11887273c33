"""The check at the start of a run: it lets in what is exact, and notices every cure that is taken out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from covering import slow_beyond
from families import FAMILIES
from real_checkpoints import REAL_FAMILIES
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    PreTrainedConfig,
)

from vgs.data.check_prompts import check_prompts
from vgs.errors import ConfigError
from vgs.log import warn_once
from vgs.models import agreement, packed, self_check
from vgs.models.agreement import Agreement, compare
from vgs.models.attention import RowLayout
from vgs.models.families import placeholder_ids
from vgs.models.forward import score_groups
from vgs.models.groups import PER_TOKEN_FIELDS, PromptGroup
from vgs.models.self_check import check_groups, examine, packs
from vgs.models.shallow import shallow_copy
from vgs.models.states import plain_states
from vgs.models.survey_models import SURVEYED, text_groups, tiny_config

#: Families of several kinds of layers and positions; the others are asked by the slow tests.
USUAL = ("qwen3_vl", "qwen2_5_vl", "internvl", "mistral3", "gemma4", "qwen3_5")
CPU = torch.device("cpu")
Checkpoint = Callable[..., Path]


def asked(folder: Path) -> tuple[type, PreTrainedConfig, list[PromptGroup]]:
    """A checkpoint's class, its config, and the prompts of the check by its own processor."""
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model_class = AutoModelForImageTextToText._model_mapping[type(config)]
    return model_class, config, check_groups(check_prompts(processor, placeholder_ids(config)))


@pytest.mark.parametrize("family", slow_beyond(USUAL, REAL_FAMILIES))
def test_every_real_family_runs_packed(family: str, checkpoint: Checkpoint) -> None:
    model_class, config, groups = asked(checkpoint(family))
    found = examine(model_class, config, groups, CPU)
    assert found.way == "packed", str(found)
    agreement = found.ways["packed"]
    assert agreement.states < 1e-4 and agreement.gradients < 1e-3, "rounding alone"
    assert any(group.has_images for group in groups) and not groups[-1].has_images


# ---- cures taken out


def found_in(folder: Path, way: str = "packed") -> Agreement:
    model_class, config, groups = asked(folder)
    return compare(shallow_copy(model_class, config, CPU), groups, way)


def test_attention_across_sequences_is_noticed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowLayout, "compose", lambda _, family: family)
    found = found_in(checkpoint("internvl"))
    # Prompts are blocks of their own; it is a prompt's second response that sees the first.
    assert not found.exact and found.states > 0.01


def test_responses_that_do_not_see_their_prompt_are_noticed(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compose(self: RowLayout, family: Callable) -> Callable:
        return lambda b, h, q, k: (
            (self.prompt[q] == self.prompt[k]) & (self.branch[q] == self.branch[k]) & family(b, h, q, k)
        )

    monkeypatch.setattr(RowLayout, "compose", compose)
    found = found_in(checkpoint("internvl"))
    assert not found.exact and "self_attn" in found.where


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v"])
def test_positions_that_only_count_are_noticed(
    family: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(model: nn.Module, ids: Tensor, images: Any) -> Tensor:
        return torch.arange(len(ids)).expand(len(original(model, ids, images)), -1)

    original = packed.prompt_positions
    monkeypatch.setattr(packed, "prompt_positions", counted)
    found = found_in(checkpoint(family))
    assert not found.exact and "rotary_emb" in found.where


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_causal_images_are_noticed(family: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the types of the tokens there is no error: images become causal."""
    original = packed.pack

    def without_types(stems: Sequence[Any], *arguments: Any, **options: Any) -> Any:
        row = original(stems, *arguments, **options)
        for name in PER_TOKEN_FIELDS:
            if name in row.images:
                row.images[name] = torch.zeros_like(row.images[name])
        return row

    monkeypatch.setattr(packed, "pack", without_types)
    assert not found_in(checkpoint(family)).exact


def test_a_gradient_that_is_lost_is_noticed(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are right here; only a prompt's gradient through its second response is missing."""
    original = packed.packed_states

    def cut(model: nn.Module, row: Any) -> Tensor:
        states = original(model, row)
        return torch.cat([states[:1], states[1:].detach()])

    monkeypatch.setattr(packed, "packed_states", cut)
    found = found_in(checkpoint("internvl"))
    assert found.states < 1e-5 and found.gradients > 0.1 and not found.exact


@pytest.mark.parametrize("family", ["ministral3", "mistral4"])
def test_padding_in_front_is_noticed(family: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their queries are scaled by the place in the row."""
    original = agreement.score_padded

    def shifted(model: nn.Module, groups: Sequence[PromptGroup], *arguments: Any) -> tuple[Tensor, ...]:
        def later(body: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            places = torch.arange(40, 40 + named["input_ids"].shape[1])
            return given, {**named, "position_ids": places[None]}

        handle = model.base_model.register_forward_pre_hook(later, with_kwargs=True)
        try:
            return original(model, groups, *arguments)
        finally:
            handle.remove()

    assert found_in(checkpoint(family), "padded").exact
    monkeypatch.setattr(agreement, "score_padded", shifted)
    assert not found_in(checkpoint(family), "padded").exact


def test_rotary_embeddings_of_the_longest_sequence_are_noticed() -> None:
    """Their frequencies change where the longest sequence at hand, which may be somebody else's, passes a length."""
    model_class, config = type(FAMILIES["internvl"].build()), FAMILIES["internvl"].build().config
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 32}
    config.text_config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **factors}
    found = examine(model_class, config, check_groups(FAMILIES["internvl"].groups()), CPU)
    assert found.way is None and all("rotary_emb" in agreement.where for agreement in found.ways.values())


# ---- families that nobody has heard of


class Behind(nn.Module):
    """Something that reaches over the tokens of a row, before a layer of the text stack."""

    def __init__(self, layer: nn.Module, sees: str) -> None:
        super().__init__()
        self.layer, self.sees = layer, sees

    def forward(self, states: Tensor) -> Tensor:
        count = torch.arange(1, states.shape[1] + 1, device=states.device)[:, None]
        mean = states.mean(dim=1, keepdim=True) if self.sees == "row" else states.cumsum(dim=1) / count
        return self.layer(states + (len(states) if self.sees == "batch" else 1) * mean)


class NewbornForConditionalGeneration(LlavaForConditionalGeneration):
    """A family of tomorrow: its text stack carries a running mean, which no field of its config tells."""

    sees = "past"

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        layer = self.model.language_model.layers[0]
        layer.mlp = Behind(layer.mlp, self.sees)


class AloneForConditionalGeneration(NewbornForConditionalGeneration):
    """A family that nobody can batch: its tokens see how many rows there are."""

    sees = "batch"


class WholeRowForConditionalGeneration(NewbornForConditionalGeneration):
    """A family that reads the answer: its tokens see the mean of their whole row."""

    sees = "row"


def test_an_unknown_family_is_padded_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("vgs.models.self_check.logger.warning", lines.append)
    warn_once.cache_clear()
    groups = FAMILIES["llava"].groups()
    model = NewbornForConditionalGeneration(FAMILIES["llava"].build().config).eval()
    assert not packs(model, groups)
    for _ in range(2):
        rows = score_groups(model, groups)
    assert len(lines) == 1
    assert "NewbornForConditionalGeneration (llava) runs in padded batches" in lines[0]
    assert "first in model.language_model.layers.0.mlp (Behind)" in lines[0]
    for actual, expected in zip(rows, plain_states(model, groups), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_family_that_no_batch_serves_is_refused_with_the_numbers() -> None:
    model = AloneForConditionalGeneration(FAMILIES["llava"].build().config).eval()
    match = (
        r"^AloneForConditionalGeneration \(llava\) cannot be run as its own forward would, neither in packed rows "
        r"nor in padded batches \(packed: states differ by \d.\de-\d\d, gradients by .* of the largest; first in "
        r"model.language_model.layers.0.mlp \(Behind\); padded: states differ by "
    )
    with pytest.raises(ConfigError, match=match):
        score_groups(model, FAMILIES["llava"].groups())


class HalvesForConditionalGeneration(NewbornForConditionalGeneration):
    """A family whose features come in halves, of which nobody can tell what belongs to which token."""

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        features = self.model.get_image_features

        def halved(*args: Any, **options: Any) -> Any:
            output = features(*args, **options)
            output.pooler_output = [x.reshape(-1, x.shape[-1] // 2) for x in output.pooler_output]
            return output

        self.model.get_image_features = halved


def test_images_that_rows_cannot_share_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("vgs.models.self_check.logger.warning", lines.append)
    warn_once.cache_clear()
    groups = FAMILIES["llava"].groups()
    model = HalvesForConditionalGeneration(FAMILIES["llava"].build().config).eval()
    found = examine(type(model), model.config, check_groups(groups), CPU)
    assert found.way == "repeated" and "does not return one feature for each image placeholder" in str(found.ways)
    for actual, expected in zip(score_groups(model, groups), plain_states(model, groups), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert "runs in padded batches, with an image for every response, which takes longer" in lines[0]


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_a_family_whose_responses_see_what_follows_is_refused(family: str) -> None:
    """PaliGemma's prompts attend in both directions, and its token types say that all else is prompt as well."""
    groups = FAMILIES["llava"].groups()
    if family == "llava":
        model = WholeRowForConditionalGeneration(FAMILIES["llava"].build().config)
    else:
        model = PaliGemmaForConditionalGeneration(tiny_config("paligemma"))
        groups = [replace(x, prompt_ids=x.text_prompt_ids, images={}) for x in groups]
    with pytest.raises(ConfigError, match=r"\(plain: states change by .* with tokens that stand behind them\)\.$"):
        packs(model, groups)


def in_16_bits_alone(kind: type) -> type:
    """The class, with kernels that know no float32."""

    class Half(kind):
        def __init__(self, config: LlavaConfig) -> None:
            super().__init__(config)
            self.model.language_model.layers[0].register_forward_pre_hook(self.refuse)

        @staticmethod
        def refuse(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            if given[0].dtype == torch.float32:
                raise AssertionError("16 bits alone")

    return Half


@pytest.mark.parametrize(
    ("kind", "way"), [(LlavaForConditionalGeneration, "packed"), (NewbornForConditionalGeneration, "padded")]
)
def test_kernels_without_float32_are_asked_in_16_bits(kind: type, way: str) -> None:
    config, groups = FAMILIES["llava"].build().config, check_groups(FAMILIES["llava"].groups())
    found = examine(in_16_bits_alone(kind), config, groups, CPU)
    assert found.way == way and found.error is None
    assert all(agreement.dtype == "bfloat16" for agreement in found.ways.values())


@pytest.mark.parametrize("family", [x for x in ("git", "mistral_large4") if x in SURVEYED])
def test_padded_batches_run_by_the_models_own_attention(family: str) -> None:
    """Whatever packed rows, tried before, have put in its place: GIT adds masks, Mistral Large 4 narrows them."""
    found = examine(getattr(transformers, SURVEYED[family]), tiny_config(family), check_groups(text_groups()), CPU)
    assert found.way == "padded" and found.ways["packed"].states is None, "refused by an error"


def test_a_family_that_cannot_be_asked_is_padded_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(LlavaForConditionalGeneration):
        def __init__(self, config: LlavaConfig) -> None:
            if config.get_text_config().dtype == torch.float32:
                raise RuntimeError("no copies")
            super().__init__(config)

    lines: list[str] = []
    monkeypatch.setattr("vgs.models.self_check.logger.warning", lines.append)
    warn_once.cache_clear()
    config = FAMILIES["llava"].build().config
    config.text_config.dtype = torch.float64
    assert not packs(Stubborn(config), FAMILIES["llava"].groups())
    assert lines == [
        "Stubborn (llava) runs in padded batches: a small copy of it cannot be asked, RuntimeError: no copies."
    ]


# ---- what it costs, and what it leaves alone


def test_an_answer_is_kept_for_config_and_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, calls = FAMILIES["internvl"], []
    original = self_check.examine
    monkeypatch.setattr(self_check, "examine", lambda *x: calls.append(x) or original(*x))
    monkeypatch.setattr(self_check, "HF_HOME", str(tmp_path))

    def ask(config: PreTrainedConfig) -> self_check.Verdict:
        monkeypatch.setattr(self_check, "_KNOWN", {})  # another process
        return self_check.verdict(type(model), config, family.groups(), CPU)

    model = family.build()
    first = ask(model.config)
    assert ask(family.build().config) == first and len(calls) == 1, "read from the disk"
    (kept,) = (tmp_path / "vgs").glob("check-*.json")
    assert json.loads(kept.read_text())["ways"]["packed"]["states"] == first.ways["packed"].states
    model.config.text_config.num_attention_heads = 4
    ask(model.config)
    assert len(calls) == 2, "another config"
    monkeypatch.setattr(self_check, "_version", lambda package: "99.0")
    ask(model.config)
    assert len(calls) == 3, "another version"
    kept.write_text("{")
    monkeypatch.undo()
    assert packs(family.build(), family.groups())


def test_models_and_random_numbers_are_left_alone() -> None:
    family = FAMILIES["gemma3"]
    model = family.build().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config, state = model.config.to_dict(), torch.get_rng_state()
    assert examine(type(model), model.config, check_groups(family.groups()), CPU).way == "packed"
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_prompts_of_the_check_are_long_and_short(checkpoint: Checkpoint) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint("qwen3_vl"))
    groups = check_groups(check_prompts(processor, placeholder_ids(AutoConfig.from_pretrained(checkpoint("qwen3_vl")))))
    assert [len(group.images.get("image_grid_thw", [])) for group in groups] == [1, 2, 0]
    assert max(len(group.prompt_ids) for group in groups) > 64 < max(groups[0].response_lengths)
