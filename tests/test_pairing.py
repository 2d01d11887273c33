"""The two views: images really gone, responses in the same columns, clear errors."""

from __future__ import annotations

import pytest
import torch
from tiny import SPECIAL, VISION_START, tiny_image, tiny_model, tiny_processor, tiny_samples
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from vgs.pairing import encode_views, pair_views, placeholder_ids, remove_images, text_only_prompts

PROCESSOR = tiny_processor()
FORBIDDEN = [SPECIAL.index(token) for token in SPECIAL[3:7]]


def test_placeholders_of_a_config() -> None:
    assert placeholder_ids(tiny_model().config) == FORBIDDEN


def test_text_only_prompt_is_rendered_without_the_image_item() -> None:
    block = [{"type": "image", "image": tiny_image(0)}, {"type": "text", "text": "red ?"}]
    prompts = [[{"role": "user", "content": block}], [{"role": "user", "content": "red ?"}]]
    with_blocks, plain = text_only_prompts(PROCESSOR, prompts, FORBIDDEN)
    assert with_blocks == plain
    assert PROCESSOR.tokenizer.decode(plain).split()[-5:] == ["red", "?", "<|im_end|>", "<|im_start|>", "assistant"]
    assert block[0]["type"] == "image", "the sample itself must not change"


def test_system_messages_survive() -> None:
    messages = [{"role": "system", "content": "answer"}, {"role": "user", "content": [{"type": "image"}]}]
    assert remove_images(messages) == [
        {"role": "system", "content": [{"type": "text", "text": "answer"}]},
        {"role": "user", "content": []},
    ]


def test_placeholder_left_in_the_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"prompt 1 still contains the image placeholder <\|vision_start\|>"):
        text_only_prompts(
            PROCESSOR,
            [[{"role": "user", "content": "red ?"}], [{"role": "user", "content": f"red {VISION_START} ?"}]],
            FORBIDDEN,
        )


def test_responses_share_columns_and_view_fields() -> None:
    samples, responses = tiny_samples(4), [[20, 1], [21, 22, 23, 1], [24], [25, 26, 1]]
    views = encode_views(PROCESSOR, samples, responses, FORBIDDEN)
    assert views.input_ids.shape == views.attention_mask.shape
    assert len(views.input_ids) == 8
    first, second = views.input_ids.chunk(2)
    assert torch.equal(first[:, -4:], second[:, -4:])
    assert views.response_ids.tolist() == [token for response in responses for token in response]
    assert views.trajectory_ids.tolist() == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3]
    assert (first == FORBIDDEN[0]).sum(dim=1).tolist() == [4, 4, 8, 4]  # every third picture is twice as wide
    assert not torch.isin(second, torch.tensor(FORBIDDEN)).any()
    types = views.multimodal["mm_token_type_ids"]
    assert types.shape == views.input_ids.shape
    assert types[4:].sum() == 0
    assert torch.equal(types[:4] == 1, first == FORBIDDEN[0])
    assert len(views.multimodal["pixel_values"]) == views.multimodal["image_grid_thw"].prod(dim=1).sum()


def test_single_views_are_the_halves() -> None:
    views = encode_views(PROCESSOR, tiny_samples(3), [[20, 1], [21], [22, 1]], FORBIDDEN)
    image, text = views.multimodal_view(), views.text_view()
    assert torch.equal(image.input_ids, views.input_ids[:3])
    assert image.multimodal["mm_token_type_ids"].shape == image.input_ids.shape
    assert text.multimodal == {}
    assert text.attention_mask[:, 0].any(), "no column of padding only is left"
    kept = text.input_ids.shape[1]
    assert torch.equal(text.input_ids, views.input_ids[3:, -kept:])
    assert views.attention_mask[3:, :-kept].sum() == 0


def tensors(batch: int = 2, prompt: int = 5, text: int = 3, columns: int = 2) -> list[torch.Tensor]:
    shapes = [(batch, prompt), (batch, text), (batch, columns)]
    return [tensor for shape in shapes for tensor in (torch.full(shape, 20), torch.ones(shape, dtype=torch.int64))]


def test_longer_text_view_widens_the_multimodal_one() -> None:
    arguments = tensors(prompt=3, text=6)
    types = torch.zeros(2, 5, dtype=torch.int64)
    types[:, 1] = 1
    views = pair_views(*arguments, {"mm_token_type_ids": types}, pad_token_id=7)
    assert views.input_ids[0].tolist() == [7, 7, 7, 20, 20, 20, 20, 20]
    assert views.attention_mask[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert views.multimodal["mm_token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
    assert views.attention_mask[2].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.__setitem__(2, a[2][:1]), "views disagree: text_prompt_ids has shape"),
        (lambda a: a.__setitem__(3, a[3][:, 1:]), "views disagree: text_prompt_ids"),
        (lambda a: a[1][:, -1].zero_(), "prompt_ids must be padded on the left"),
        (lambda a: a[2][1, 2].fill_(FORBIDDEN[0]), "Row 1 of text_prompt_ids still contains an image placeholder"),
    ],
)
def test_disagreeing_views(change, message: str) -> None:
    arguments = tensors()
    change(arguments)
    with pytest.raises(ValueError, match=message):
        pair_views(*arguments, {}, forbidden=FORBIDDEN)


def test_wrong_field_and_count() -> None:
    with pytest.raises(ValueError, match=r"mm_token_type_ids must have shape \(2, 7\), got \(2, 5\)"):
        pair_views(*tensors(), {"mm_token_type_ids": torch.zeros(2, 5)})
    with pytest.raises(ValueError, match="2 responses for 3 samples"):
        encode_views(PROCESSOR, tiny_samples(3), [[1], [1]], FORBIDDEN)


def test_text_view_survives_the_hosts_shuffle_and_split() -> None:
    batch = {"completion_ids": torch.arange(4)[:, None], "text_prompt_ids": torch.arange(4)[:, None] * 10}
    batch |= {"text_prompt_mask": torch.ones(4, 1), "num_items_in_batch": torch.tensor(4)}
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 2):
        assert torch.equal(part["completion_ids"] * 10, part["text_prompt_ids"])
        assert part["text_prompt_mask"].shape == (2, 1)
        assert part["num_items_in_batch"] == 4
