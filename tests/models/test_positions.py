"""Positions of prompts and responses equal those that the model itself hands to its decoder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES
from real_checkpoints import REAL_FAMILIES, photo_samples
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import vgs
from vgs.models.groups import PER_TOKEN_FIELDS, PromptGroup
from vgs.models.packing import image_stem, pack, text_stem
from vgs.models.positions import prompt_positions


def own_positions(model: nn.Module, group: PromptGroup, response: Tensor, with_images: bool) -> Tensor:
    """[R, P + T] of a prompt with one of its responses: what the decoder is given in a plain forward."""
    prompt = group.prompt_ids if with_images else group.text_prompt_ids
    ids = torch.cat([prompt, response])[None]
    fields = dict(group.images) if with_images else {}
    for name in PER_TOKEN_FIELDS:
        if name in group.images:
            kinds = group.images[name] if with_images else torch.zeros_like(prompt)
            fields[name] = torch.cat([kinds, torch.zeros_like(response)])[None]
    seen: list[Any] = []
    body = model.base_model
    handle = body.get_decoder().register_forward_pre_hook(
        lambda _, arguments, named: seen.append(named.get("position_ids")), with_kwargs=True
    )
    try:
        body(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **fields)
    finally:
        handle.remove()
    if seen[0] is None:  # then the decoder counts
        return torch.arange(ids.shape[1])[None]
    return seen[0].reshape(-1, ids.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("family", REAL_FAMILIES)
def test_positions_are_the_models_own(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint(family)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    responses = [[[70, 71, 72], [80, 81]], [[90, 91]], [[100, 75, 76]]]
    groups = vgs.encode_groups(AutoProcessor.from_pretrained(folder), photo_samples(tmp_path), responses, [])
    for group in groups:
        positions = prompt_positions(model, group.prompt_ids, group.images)
        for stem, with_images in ((image_stem(group, positions), True), (text_stem(group, len(positions)), False)):
            row = pack([stem], "cpu")
            packed = row.position_ids[1:, 0] if len(positions) > 1 else row.position_ids
            start = len(stem.ids)
            for response in group.responses:
                inputs = response[:-1]
                places = torch.cat([torch.arange(len(stem.ids)), torch.arange(start, start + len(inputs))])
                expected = own_positions(model, group, inputs, with_images).expand(len(positions), -1)
                assert torch.equal(packed[:, places], expected)
                start += len(inputs)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize(("grids", "tokens"), [([[1, 4, 4]], 4), ([[1, 2, 4], [1, 2, 2]], 3)], ids=["other", "missing"])
def test_prompts_that_do_not_fit_to_their_images_are_refused(family: str, grids: list, tokens: int) -> None:
    model, group = FAMILIES[family].build(), FAMILIES[family].group([(2, 4)], [1], 0)
    match = (
        rf"^prompt_ids has 2 image placeholders.*{re.escape(str(grids))} make {tokens} tokens: .*lost their alignment"
    )
    with pytest.raises(ValueError, match=match):
        prompt_positions(model, group.prompt_ids, {"image_grid_thw": torch.tensor(grids)})


def test_a_family_may_count_other_tokens_than_squares_of_patches() -> None:
    """HunYuan: a token more for every row, and four axes."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}
    text = {"head_dim": 16, "num_hidden_layers": 1, "rope_parameters": rope}
    config = transformers.HunYuanVLConfig(text_config=text, vision_config={"num_hidden_layers": 1})
    with torch.device("meta"):
        model = transformers.HunYuanVLForConditionalGeneration(config)
    side = config.vision_config.spatial_merge_size
    grid = torch.tensor([[1, 2 * side, 3 * side]])
    prompt = torch.tensor([7, *[config.image_token_id] * (2 * 4 + 2), 8])
    kinds = (prompt == config.image_token_id).long()
    positions = prompt_positions(model, prompt, {"image_grid_thw": grid, "mm_token_type_ids": kinds})
    assert len(positions) == 4
    assert positions[-2].tolist() == [0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 10, 11]
    with pytest.raises(ValueError, match="span"):
        prompt_positions(model, prompt[2:], {"image_grid_thw": grid, "mm_token_type_ids": kinds[2:]})


def test_positions_on_any_number_of_axes_are_packed_behind_the_places() -> None:
    ids, response = torch.tensor([8, 9, 10]), torch.tensor([11, 12, 13])
    positions = torch.tensor([[0, 1, 4], [0, 2, 4], [0, 1, 1], [0, 0, 2]])
    group = PromptGroup(ids, ids, (response, response), {})
    row = pack([image_stem(group, positions)], "cpu")
    assert row.position_ids[:, 0].tolist() == [
        [0, 1, 2, 3, 4, 3, 4],
        *[[*axis, 5, 6, 5, 6] for axis in positions.tolist()],
    ]
