"""Packed scoring equals one plain forward per response, in every family: values, gradients, both views."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, LLAVA_NEXT, assert_same_gradients, gradients_of, separate, separate_rows
from torch import Tensor, nn

from vgs.models.forward import score_groups
from vgs.models.image_fields import join_images
from vgs.models.positions import prompt_positions
from vgs.models.self_check import packs

GROUPS = {name: family.groups() for name, family in FAMILIES.items()}
LENGTHS = [length for group in GROUPS["llava"] for length in group.response_lengths]
MARKS = [True, False, True, False, False, True]  # one for each response: within prompts, for whole ones


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> nn.Module:
    return FAMILIES[family].build()


@pytest.fixture(scope="module")
def plain(family: str) -> nn.Module:
    """The same model, which never runs a packed row."""
    return FAMILIES[family].build()


@pytest.fixture
def trained(model: nn.Module) -> Iterator[nn.Module]:
    """The model in training mode."""
    yield model.train()
    model.gradient_checkpointing_disable()
    model.eval()


def gradients(model: nn.Module, rows: Sequence[Tensor], marks: Sequence[bool]) -> dict[str, Tensor]:
    """Of the rows, the text-only ones of responses with a mark only."""
    return gradients_of(model, rows, torch.tensor(marks).repeat_interleave(torch.tensor(LENGTHS)))


@torch.no_grad()
def test_images_and_masks_matter(family: str, plain: nn.Module) -> None:
    """Otherwise the comparisons below would mean nothing."""
    group = GROUPS[family][0]
    rows = separate_rows(plain, group, True)
    others = {"text": separate_rows(plain, group, False)}
    pixels = {**group.images, "pixel_values": -group.images["pixel_values"]}
    others["pixels"] = separate_rows(plain, replace(group, images=pixels), True)
    if family == "gemma3":
        kinds = {**group.images, "token_type_ids": torch.zeros_like(group.prompt_ids)}
        others["bidirectional images"] = separate_rows(plain, replace(group, images=kinds), True)
    text = plain.config.get_text_config()
    if family in ("gemma3", "llava_pixtral"):
        window, text.sliding_window = text.sliding_window, 100
        others["window"] = separate_rows(plain, group, True)
        text.sliding_window = window
    for name, other in others.items():
        assert (rows - other).abs().max() > 0.1, name


@torch.no_grad()
@pytest.mark.parametrize("share_prefix", [True, False])
def test_rows_equal_separate_passes(family: str, model: nn.Module, plain: nn.Module, share_prefix: bool) -> None:
    assert packs(model, GROUPS[family])
    expected = separate(plain, GROUPS[family])
    actual = score_groups(model, GROUPS[family], share_prefix=share_prefix)
    for rows, oracle in zip(actual, expected, strict=True):
        torch.testing.assert_close(rows, oracle, rtol=0, atol=1e-5)
    torch.testing.assert_close(score_groups(model, GROUPS[family], text=False)[0], expected[0], rtol=0, atol=1e-5)
    alone = score_groups(model, GROUPS[family][1:2], text=False)[0]  # no image in the whole row
    torch.testing.assert_close(alone, separate_rows(plain, GROUPS[family][1], True), rtol=0, atol=1e-5)
    unpacked = separate_rows(model, GROUPS[family][0], True)  # its attention is ours, but outside a packed row
    torch.testing.assert_close(unpacked, expected[0][: len(unpacked)], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text_gradient", "checkpointing"),
    [(True, False), (False, False), (MARKS, False), (MARKS, True)],
    ids=["text", "no text", "some text", "checkpointing"],
)
def test_gradients_equal_those_of_separate_passes(
    family: str, trained: nn.Module, plain: nn.Module, text_gradient: bool | list[bool], checkpointing: bool
) -> None:
    marks = [text_gradient] * len(LENGTHS) if isinstance(text_gradient, bool) else text_gradient
    oracle = separate(plain, GROUPS[family])
    expected = gradients(plain, oracle, marks)
    if checkpointing:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    rows = score_groups(trained, GROUPS[family], text_gradient=text_gradient)
    torch.testing.assert_close(rows[1], oracle[1], rtol=0, atol=1e-5)
    assert_same_gradients(gradients(trained, rows, marks), expected)


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_positions_need_no_weights_and_pass_through_an_adapter(family: str) -> None:
    peft = pytest.importorskip("peft")
    model = FAMILIES[family].build().to("meta")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    group = FAMILIES[family].group([(2, 4)], [1], 0)  # two words, start, 1 x 2 merged patches, end, three words
    time, height, width = prompt_positions(model, group.prompt_ids, group.images).tolist()
    assert time == height == [0, 1, 2, 3, 3, 5, 6, 7, 8]
    assert width == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert prompt_positions(model, group.text_prompt_ids, {}).tolist() == [[0, 1, 2, 3, 4]] * 3


def test_tiles_of_an_image_pack() -> None:
    """LLaVA-NeXT makes several tiles of an image, with a newline for each row of them."""
    model, plain, groups = LLAVA_NEXT.build(), LLAVA_NEXT.build(), LLAVA_NEXT.groups()
    assert packs(model, groups)
    oracle, rows = separate(plain, groups), score_groups(model, groups)
    for actual, expected in zip(rows, oracle, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    marks = [True] * len(LENGTHS)
    assert_same_gradients(gradients(model, rows, marks), gradients(plain, oracle, marks))


def test_images_that_do_not_fit_together_are_refused() -> None:
    pixels, grid = torch.zeros(4, 6), torch.tensor([[1, 2, 2]])
    good = {"pixel_values": pixels, "image_grid_thw": grid}
    with pytest.raises(ValueError, match=r"the field 'pixel_values_videos'; expected some of"):
        join_images([good, {"pixel_values_videos": pixels}])
    with pytest.raises(ValueError, match="1 of 2 prompts with images have the field 'image_grid_thw'"):
        join_images([good, {"pixel_values": pixels}])
    with pytest.raises(ValueError, match=r"pixel_values have shapes \(4, 6\), \(4, 5\)"):
        join_images([good, {**good, "pixel_values": torch.zeros(4, 5)}])
