"""How Qwen3-VL's own forward takes a packed row: one form is exact, the others are silently wrong.

If one of the wrong ones turns right, the library has changed, and ``vgs.models.packing`` may become simpler.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn

Forms = dict[str, Callable[[dict[str, Tensor]], dict]]

# Each form, out of the row's input_ids, four-row position_ids, mm_token_type_ids and image fields.
WRONG: Forms = {
    "with the default cache": lambda row: {**row, "use_cache": None},
    "with a mask of ones": lambda row: {**row, "attention_mask": torch.ones_like(row["input_ids"])},
    "without text positions": lambda row: {**row, "position_ids": row["position_ids"][1:]},
    "with text positions alone": lambda row: {**row, "position_ids": row["position_ids"][0]},
    "with positions left to the model": lambda row: {**row, "position_ids": None},
    "with placeholders but no pixels": lambda row: {**row, "pixel_values": None, "image_grid_thw": None},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return FAMILIES["qwen3_vl"].build()


@pytest.fixture(scope="module")
def packed(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Two prompts in both views as one row's arguments, and the states [T, D] of four separate passes."""
    family = FAMILIES["qwen3_vl"]
    groups = [family.group([family.small], [], 0), family.group([family.large, family.small], [], 1)]
    ids, kinds, positions, states = [], [], [], []
    for group in groups:
        image_fields = {name: group.images[name] for name in ("pixel_values", "image_grid_thw")}
        kind = group.images["mm_token_type_ids"]
        views = ((group.prompt_ids, kind, image_fields), (group.text_prompt_ids, torch.zeros(1).long(), {}))
        for prompt, types, fields in views:
            types = types.expand(len(prompt))
            count = torch.arange(len(prompt))
            axes = model.model.get_rope_index(prompt[None], types[None], fields.get("image_grid_thw"))[0][:, 0]
            with torch.no_grad():
                plain = model.model(input_ids=prompt[None], mm_token_type_ids=types[None], use_cache=False, **fields)
            ids.append(prompt)
            kinds.append(types)
            positions.append(torch.cat([count[None], axes]))
            states.append(plain.last_hidden_state[0])
    row = {
        "input_ids": torch.cat(ids)[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "mm_token_type_ids": torch.cat(kinds)[None],
        "pixel_values": torch.cat([group.images["pixel_values"] for group in groups]),
        "image_grid_thw": torch.cat([group.images["image_grid_thw"] for group in groups]),
        "use_cache": False,
    }
    return row, torch.cat(states)


@torch.no_grad()
def error(model: nn.Module, arguments: dict, expected: Tensor) -> float:
    return (model.model(**arguments).last_hidden_state[0] - expected).abs().max().item()


def test_four_rows_of_positions_without_mask_or_cache_are_exact(model: nn.Module, packed) -> None:
    row, expected = packed
    assert row["position_ids"].shape == (4, 1, row["input_ids"].shape[1])
    assert error(model, row, expected) <= 1e-5


@pytest.mark.parametrize("form", WRONG)
def test_any_other_form_is_silently_wrong(model: nn.Module, packed, form: str) -> None:
    row, expected = packed
    assert error(model, WRONG[form](row), expected) > 0.1
