"""Padded batches equal separate plain forwards, and run each image through the tower once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import slow_beyond
from real_checkpoints import FIELD_FAMILIES, REAL_FAMILIES, photo_samples
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import vgs
from vgs.models.families import backbone, placeholder_ids
from vgs.models.groups import PER_TOKEN_FIELDS, PromptGroup
from vgs.models.heads import output_layer
from vgs.models.states import score_padded

Checkpoint = Callable[..., Path]
#: Of one image, two images of different sizes, and none.
RESPONSES = [[[70, 71, 72], [80, 81], [82], [83, 84, 85, 86]], [[90, 91], [92]], [[100, 75, 76]]]
COUNT = 16
#: Names of the module that takes pixels.
TOWERS = ("visual", "vision_tower", "vision_model", "embed_vision")
#: One family for each form in which features come, and for each rule of joining fields; the others are slow.
FORMS = {"qwen3_vl", "internvl", "llava_next", "mistral3", "gemma4", "smolvlm"}
FORMS |= {"minicpmv4_7", "molmo2", "step3p7", "nemotron_h_omni"}
FAMILIES = slow_beyond(FORMS, (*REAL_FAMILIES, *FIELD_FAMILIES))


def prepared(folder: Path, samples: Path) -> tuple[nn.Module, list[PromptGroup]]:
    """A model in float64, where it can run in it, and its groups."""
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    single = ("experts", "mamba", "mixer")  # whose kernels know no float64
    names = ".".join(name for name, _ in model.named_parameters())
    dtype = torch.float32 if any(part in names for part in single) else torch.float64
    model = model.to(dtype)
    processor = AutoProcessor.from_pretrained(folder)
    groups = vgs.encode_groups(processor, photo_samples(samples), RESPONSES, placeholder_ids(model.config))
    for group in groups:
        group.images.update({name: x.to(dtype) for name, x in group.images.items() if x.is_floating_point()})
    return model, groups


@contextmanager
def entering(model: nn.Module) -> Iterator[list[Tensor]]:
    """What enters the head inside."""
    states: list[Tensor] = []
    handle = output_layer(model).register_forward_pre_hook(lambda _, given: states.append(given[0]))
    yield states
    handle.remove()


def plain_rows(model: nn.Module, groups: list[PromptGroup], with_image: bool) -> Tensor:
    """[N, D] states that predict the responses, from the model's own forward on each of them alone."""
    rows = []
    for group in groups:
        prompt = group.prompt_ids if with_image else group.text_prompt_ids
        for response in group.responses:
            ids = torch.cat([prompt, response])[None]
            fields = dict(group.images) if with_image else {}
            for name in PER_TOKEN_FIELDS & fields.keys():
                fields[name] = torch.cat([fields[name], torch.zeros_like(response)])[None]
            with entering(model) as states:
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **fields)
            rows.append(states[0][0, len(prompt) - 1 : -1])
    return torch.cat(rows)


def gradients(model: nn.Module, rows: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(2, COUNT, rows[0].shape[1], generator=torch.Generator().manual_seed(0)).to(rows[0])
    model.zero_grad()
    sum((x * weight).sum() for x, weight in zip(rows, weights, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def pixels_seen(model: nn.Module, task: Callable[[], Any]) -> list[int]:
    """Numbers that enter the vision tower, one entry for each call."""
    tower = next(module for name in TOWERS if (module := getattr(backbone(model), name, None)) is not None)
    seen: list[int] = []

    def note(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.append((given[0] if given else named["pixel_values"]).numel())

    handle = tower.register_forward_pre_hook(note, with_kwargs=True)
    task()
    handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_equal_separate_forwards(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Values and gradients of both views; a prompt's images run once for its four responses."""
    model, groups = prepared(checkpoint(family), tmp_path)
    device = torch.device("cpu")
    plain = plain_rows(model, groups, True), plain_rows(model, groups, False)
    expected = gradients(model, plain)
    padded = score_padded(model, groups, True, [True] * 7, device)
    for rows, others in zip(padded, plain, strict=True):
        torch.testing.assert_close(rows, others, rtol=0, atol=1e-5)
    found = gradients(model, padded)
    assert found.keys() == expected.keys()
    scale = float(max(value.abs().max() for value in expected.values()))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale, msg=name)
    assert (plain[0] - plain[1]).abs().max() > 1e-2, "images matter"
    seen = pixels_seen(model, lambda: score_padded(model, groups[:1], False, [], device))
    each = pixels_seen(model, lambda: plain_rows(model, groups[:1], True))
    assert seen == each[:1] and len(each) == 4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_adapters_in_the_tower_under_checkpointing(
    family: str, reentrant: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The tower's gradients are those of a plain forward for each response, summed."""
    model, groups = prepared(checkpoint(family), tmp_path)
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    model = model.double().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plain = plain_rows(model, groups, True), plain_rows(model, groups, False)
    expected = gradients(model, plain)
    padded = score_padded(model, groups, True, [True] * 7, torch.device("cpu"))
    found = gradients(model, padded)
    assert found.keys() == expected.keys()
    assert any("vis" in name and value.any() for name, value in expected.items())
    scale = float(max(value.abs().max() for value in expected.values()))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5 * scale, msg=name)


@torch.no_grad()
def test_repeated_images_say_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model, groups = prepared(checkpoint("llava_next"), tmp_path)
    once, repeated = (
        score_padded(model, groups, True, [True] * 7, torch.device("cpu"), share_images=share)
        for share in (True, False)
    )
    for rows, others in zip(once, repeated, strict=True):
        torch.testing.assert_close(rows, others, rtol=0, atol=1e-6)
    calls = pixels_seen(
        model, lambda: score_padded(model, groups[:1], False, [], torch.device("cpu"), share_images=False)
    )
    assert calls == [4 * groups[0].images["pixel_values"].numel()]


@pytest.mark.parametrize("family", [x for x in FIELD_FAMILIES if x == "molmo2"])
def test_text_only_batches_have_token_types_in_training(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Molmo 2 demands them of every batch."""
    model, groups = prepared(checkpoint(family), tmp_path)
    device = torch.device("cpu")
    expected = score_padded(model, groups, True, [True] * 7, device)
    model.train()
    for rows, others in zip(score_padded(model, groups, True, [True] * 7, device), expected, strict=True):
        torch.testing.assert_close(rows, others)
    with pytest.raises(ValueError, match="mm_token_type_ids"):
        model(input_ids=groups[2].prompt_ids[None])
