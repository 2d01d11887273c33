"""The two views: images really gone, responses in the same columns, clear errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import SPECIAL, VISION_START, tiny_image, tiny_model, tiny_processor, tiny_samples

from vgs.data.messages import fill_images, remove_evidence
from vgs.data.prompts import anchor_group, encode_groups
from vgs.models.families import placeholder_ids
from vgs.models.groups import response_lengths, trajectory_ids
from vgs.models.padding import pad_groups

PROCESSOR = tiny_processor()
FORBIDDEN = [SPECIAL.index(token) for token in SPECIAL[3:7]]


def test_placeholders_of_a_config() -> None:
    assert placeholder_ids(tiny_model().config) == FORBIDDEN


def test_text_only_prompt_is_rendered_without_the_image_item() -> None:
    block = [{"type": "image", "image": tiny_image(0)}, {"type": "text", "text": "red ?"}]
    prompts = [[{"role": "user", "content": block}], [{"role": "user", "content": "red ?"}]]
    samples = [{"prompt": prompt, "images": []} for prompt in prompts]
    with_blocks, plain = (x.text_prompt_ids.tolist() for x in encode_groups(PROCESSOR, samples, [[], []], FORBIDDEN))
    assert with_blocks == plain
    assert PROCESSOR.tokenizer.decode(plain).split()[-5:] == ["red", "?", "<|im_end|>", "<|im_start|>", "assistant"]
    assert block[0]["type"] == "image", "the sample itself must not change"


def test_system_messages_survive() -> None:
    messages = [{"role": "system", "content": "answer"}, {"role": "user", "content": [{"type": "image"}]}]
    assert remove_evidence(messages) == [
        {"role": "system", "content": [{"type": "text", "text": "answer"}]},
        {"role": "user", "content": []},
    ]


def test_placeholder_left_in_the_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^sample 1: the prompt has the image placeholder <\|vision_start\|> in"):
        encode_groups(
            PROCESSOR,
            [{"prompt": [{"role": "user", "content": f"red {x}?"}], "images": []} for x in ("", f"{VISION_START} ")],
            [[], []],
            FORBIDDEN,
        )


def test_groups_hold_both_views_and_their_own_images() -> None:
    samples, responses = tiny_samples(4), [[[20, 1]], [[21, 22, 23, 1], [24]], [[24]], [[25, 26, 1]]]
    groups = encode_groups(PROCESSOR, samples, responses, FORBIDDEN)
    assert [[x.tolist() for x in group.responses] for group in groups] == responses
    assert [(group.prompt_ids == FORBIDDEN[0]).sum().item() for group in groups] == [4, 4, 8, 4]  # the third is wide
    assert not any(torch.isin(group.text_prompt_ids, torch.tensor(FORBIDDEN)).any() for group in groups)
    for group in groups:
        assert torch.equal(group.images["mm_token_type_ids"] == 1, group.prompt_ids == FORBIDDEN[0])
        assert len(group.images["pixel_values"]) == group.images["image_grid_thw"].prod()
    assert response_lengths(groups) == [2, 4, 1, 1, 3]
    assert trajectory_ids(groups).tolist() == [0, 0, 1, 1, 1, 1, 2, 3, 4, 4, 4]


def test_a_sample_without_an_image_has_two_equal_views() -> None:
    sample = {"prompt": [{"role": "user", "content": "red ?"}], "images": []}
    group = encode_groups(PROCESSOR, [sample], [[[20]]], FORBIDDEN)[0]
    assert not group.has_images
    assert torch.equal(group.prompt_ids, group.text_prompt_ids)


def test_wrong_count() -> None:
    with pytest.raises(ValueError, match="responses holds entries for 2 samples, expected 3"):
        encode_groups(PROCESSOR, tiny_samples(3), [[[1]], [[1]]], FORBIDDEN)


def test_padding_stands_behind_the_responses() -> None:
    responses = [[[20, 1]], [[21, 22, 23, 1], [24]], [[25, 26, 1]]]
    groups = encode_groups(PROCESSOR, tiny_samples(3), responses, FORBIDDEN)
    answers = [response for group in responses for response in group]
    singles = [single for group in groups for single in group.alone()]
    for name in ("multimodal", "text"):
        view = pad_groups(groups, name, "cpu", pad_token_id=7)
        assert view.input_ids.shape == view.attention_mask.shape == view.scored.shape
        prompts = [x.prompt_ids if name == "multimodal" else x.text_prompt_ids for x in singles]
        for row, mask, scored, prompt, answer in zip(*view[:3], prompts, answers, strict=True):
            length = len(prompt) + len(answer)
            assert row[:length].tolist() == [*prompt.tolist(), *answer]
            assert mask.tolist() == [1] * length + [0] * (len(row) - length)
            assert row[1:][scored[:-1]].tolist() == answer, "scored by the token before"
        assert (view.input_ids[view.attention_mask == 0] == 7).all()
        assert view.attention_mask[:, -1].any(), "no column of padding only"
        assert torch.equal(view.images["mm_token_type_ids"] == 1, view.input_ids == FORBIDDEN[0])
        if name == "multimodal":
            assert len(view.images["image_grid_thw"]) == 4, "an image for each response"
        else:
            assert view.images.keys() == {"mm_token_type_ids"}


PLACE, TEXT = {"type": "image"}, {"type": "text", "text": "red ?"}
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "strings": ([{"role": "system", "content": "answer"}, {"role": "user", "content": "red ?"}], 2),
    "turns": (
        [
            {"role": "user", "content": "red ?"},
            {"role": "assistant", "content": "blue"},
            {"role": "user", "content": "a b or c ?"},
        ],
        1,
    ),
    "places": ([{"role": "user", "content": [PLACE, TEXT, PLACE]}, {"role": "assistant", "content": [PLACE]}], 3),
    "filled": ([{"role": "user", "content": [{"type": "image", "image": "here"}, TEXT, PLACE]}], 1),
    "calls": ([{"role": "user", "content": "red ?"}, {"role": "assistant", "tool_calls": []}], 0),
    "tools": ([{"role": "user", "content": "red ?"}, {"role": "tool", "content": [PLACE, TEXT]}], 1),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_images_go_where_the_host_puts_them(name: str) -> None:
    """Sampled prompts are rendered by TRL, scored ones by us."""
    data_utils = pytest.importorskip("trl.data_utils")
    messages, count = CONVERSATIONS[name]
    images = [f"image {index}" for index in range(count)]
    before = repr(messages)
    assert fill_images(messages, images) == data_utils.prepare_multimodal_messages(messages, images=images)
    assert repr(messages) == before, "the sample itself must not change"


def test_images_without_a_place() -> None:
    with pytest.raises(ValueError, match="images has 2 entries, but the prompt has places for 1"):
        fill_images([{"role": "user", "content": [PLACE, TEXT]}], ["one", "two"])
    with pytest.raises(ValueError, match="the role 'human'; expected one of system, user, assistant, tool"):
        fill_images([{"role": "human", "content": "red ?"}], [])


def test_an_anchor_is_one_image_and_one_token() -> None:
    group = anchor_group(PROCESSOR, FORBIDDEN)
    assert group.has_images and group.response_lengths == [1]


def test_no_samples_are_no_groups() -> None:
    assert encode_groups(PROCESSOR, [], [], FORBIDDEN) == []
