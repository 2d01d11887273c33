"""Steps of real families with their processors: gradients, padding that must not show, what is never sampled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from real_checkpoints import REAL_FAMILIES, photo_samples
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

import vgs
from vgs.data.prompts import encode_prompt, encode_prompts
from vgs.errors import ConfigError
from vgs.models.families import freeze, placeholder_ids
from vgs.models.groups import PromptGroup
from vgs.models.image_fields import join_images
from vgs_kernels import VGSObjective

Checkpoint = Callable[..., Path]
RESPONSES = [[[70, 71, 72], [80, 81]], [[90, 91]], [[100, 75, 76]]]


def loaded(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa", **options).eval()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma4", "llava_pixtral", "smolvlm"])
def test_a_step_is_the_mean_of_its_samples_steps(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """``vgs_step`` of a batch against one call for each sample: loss and every gradient."""
    student, teacher = loaded(checkpoint(family)), loaded(checkpoint(family, teacher=True))
    processor, samples = AutoProcessor.from_pretrained(checkpoint(family)), photo_samples(tmp_path)
    # Without the gated term: the gate of a sample without images would be one of rounding.
    objective = VGSObjective(lam=0.0)

    def gradients(*parts: tuple[list[dict], list]) -> tuple[float, dict[str, torch.Tensor]]:
        student.zero_grad()
        total = 0.0
        for own, responses in parts:
            output = vgs.vgs_step(student, teacher, processor, own, responses, objective, num_items=4)
            output.loss.backward()
            total += output.loss.item()
        return total, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    loss, whole = gradients((samples, RESPONSES))
    summed, parts = gradients(*[([x], [y]) for x, y in zip(samples, RESPONSES, strict=True)])
    assert loss == pytest.approx(summed, rel=1e-4)
    assert whole.keys() == parts.keys()
    largest = max(x.abs().max() for x in parts.values())
    assert all((whole[name] - x).abs().max() <= 1e-4 * largest for name, x in parts.items())
    assert any("vision" in name or "visual" in name for name in whole)


@torch.no_grad()
def test_gemma_4_pads_and_nothing_of_it_is_left(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Its processor fills up the shorter prompts of a batch unless it is told not to."""
    folder = checkpoint("gemma4")
    processor, samples = AutoProcessor.from_pretrained(folder), photo_samples(tmp_path)
    texts = [[{"role": "user", "content": [{"type": "text", "text": x["prompt"][0]["content"]}]}] for x in samples]
    batch = processor.apply_chat_template(texts, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert len({len(ids) for ids in batch["input_ids"]}) == 1, "padded, as published"
    groups = vgs.encode_groups(processor, samples, RESPONSES, placeholder_ids(AutoConfig.from_pretrained(folder)))
    assert len({len(group.text_prompt_ids) for group in groups}) == 3
    pad = processor.tokenizer.pad_token_id
    assert not any((ids == pad).any() for group in groups for ids in (group.prompt_ids, group.text_prompt_ids))
    model = loaded(folder)
    for alone, together in zip(groups, vgs.score_groups(model, groups)[1].split([5, 2, 3]), strict=True):
        (_, text) = vgs.score_groups(model, [alone])
        torch.testing.assert_close(text, together, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_does_not_move_absolute_positions() -> None:
    """Ministral 3 scales queries by their place in the sequence, here from the eighth on."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    text = transformers.Ministral3Config(
        **sizes,
        vocab_size=64,
        num_hidden_layers=2,
        num_key_value_heads=1,
        pad_token_id=0,
        rope_parameters={**rope, "beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.9},
    )
    vision = transformers.PixtralVisionConfig(**sizes, num_hidden_layers=1, image_size=32, patch_size=8)
    torch.manual_seed(0)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_id=63)
    model = transformers.Mistral3ForConditionalGeneration(config).eval()
    model.apply(lambda x: x.weight.normal_(std=0.3) if isinstance(x, nn.Linear) else None)
    prompts = [torch.arange(1, 1 + length) for length in (5, 30)]
    groups = [PromptGroup(ids, ids, (torch.tensor([40, 41, 42]),), {}) for ids in prompts]
    rows = torch.cat(
        [model.base_model(input_ids=torch.cat([x.prompt_ids, x.responses[0]])[None])[0][0, -4:-1] for x in groups]
    )
    for view in vgs.score_groups(model, groups):
        torch.testing.assert_close(view, rows, rtol=1e-4, atol=1e-4)
    shifted = model.base_model(input_ids=prompts[0][None], position_ids=torch.arange(25, 30)[None])[0]
    plain = model.base_model(input_ids=prompts[0][None])[0]
    assert (shifted - plain).abs().max() > 1e-2, "positions matter"


@pytest.mark.parametrize("family", REAL_FAMILIES)
def test_tokens_that_break_positions_are_never_sampled(family: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint(family)
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    forbidden = placeholder_ids(config)
    assert config.image_token_id in forbidden
    names = {"<|audio|>", "<|audio>", "<audio|>", "<|image>", "<image|>"} if family == "gemma4" else set()
    names |= {"<start_of_image>", "<end_of_image>"} if family == "gemma3" else set()
    names |= {"<|vision_start|>", "<|vision_end|>", "<|video_pad|>"} if family.startswith("qwen") else set()
    assert names <= set(processor.tokenizer.convert_ids_to_tokens(forbidden))
    assert not {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id} & set(forbidden)


def test_per_layer_tables_are_frozen_with_the_embeddings(checkpoint: Checkpoint) -> None:
    model = loaded(checkpoint("gemma4", teacher=True))
    freeze(model, embeddings=True)
    text = model.base_model.language_model
    assert not text.embed_tokens.weight.requires_grad and not text.embed_tokens_per_layer.weight.requires_grad
    assert model.lm_head.weight.requires_grad and text.layers[0].self_attn.q_proj.weight.requires_grad


def test_a_field_without_a_rule_is_refused_with_its_class(checkpoint: Checkpoint, tmp_path: Path) -> None:
    processor, samples = AutoProcessor.from_pretrained(checkpoint("internvl")), photo_samples(tmp_path)
    original = type(processor).apply_chat_template

    class Later(type(processor)):
        def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
            return {**original(self, *args, **kwargs), "cross_attention_mask": torch.ones(1, 2)}

    processor.__class__ = Later
    with pytest.raises(
        ConfigError, match=r"^sample 0: Later returns the field 'cross_attention_mask', for which there is no rule"
    ):
        encode_prompts(processor, samples)


def test_pictures_of_different_sizes_are_filled_up() -> None:
    """[prompts, images, C, H, W] of Idefics, and the mask that says where they are."""
    small, large = torch.ones(1, 2, 3, 4, 4), torch.ones(1, 1, 3, 6, 4)
    parts = [{"pixel_values": x, "pixel_attention_mask": x[:, :, 0]} for x in (small, large)]
    joined = join_images(parts)
    assert joined["pixel_values"].shape == (1, 3, 3, 6, 4) and joined["pixel_attention_mask"].shape == (1, 3, 6, 4)
    assert joined["pixel_values"].sum() == small.sum() + large.sum()
    patches = join_images([{"pixel_values": torch.ones(n, 2, 40, 40, 3)} for n in (4, 4)])["pixel_values"]
    assert patches.shape == (8, 2, 40, 40, 3), "patches of Inkling, channels last"
    counts = join_images([{"pixel_values": torch.ones(n, 3), "batch_num_images": torch.tensor([n])} for n in (1, 2)])
    assert counts["batch_num_images"].tolist() == [1, 2]


@pytest.mark.parametrize("family", ["internvl", "gemma4", "llava_pixtral"])
def test_template_options_change_both_views(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    processor, (sample, *_) = AutoProcessor.from_pretrained(checkpoint(family)), photo_samples(tmp_path)
    template = (processor.chat_template or processor.tokenizer.chat_template) + "{{ word }}"
    options = {"chat_template": template, "word": "green"}
    (group,) = vgs.encode_groups(processor, [sample], [[]], [], **options)
    plain = vgs.encode_groups(processor, [sample], [[]], [])[0]
    tail = encode_prompt(processor.tokenizer, "green")[0].tolist()
    tail = [token for token in tail if token != processor.tokenizer.bos_token_id]
    for ids, before in ((group.prompt_ids, plain.prompt_ids), (group.text_prompt_ids, plain.text_prompt_ids)):
        assert ids.tolist()[-len(tail) :] == tail and len(ids) > len(before)
