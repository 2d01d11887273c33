"""Privileged images of prompts whose own images stand within the text."""

from __future__ import annotations

import pytest
from tiny import tiny_image, tiny_processor

from vgs.data.privileged import privileged_sample
from vgs.data.prompts import encode_prompts

IMAGE = {"type": "image"}
RED, BLUE = {"type": "text", "text": "red"}, {"type": "text", "text": "blue ?"}


@pytest.mark.parametrize(
    ("mode", "content", "seeds"),
    [("add", [RED, IMAGE, BLUE, IMAGE, IMAGE, IMAGE], [0, 1, 2, 3]), ("replace", [RED, IMAGE, IMAGE, BLUE], [2, 3])],
)
def test_there_are_as_many_places_as_images(mode: str, content: list[dict], seeds: list[int]) -> None:
    prompt = [{"role": "system", "content": "answer"}, {"role": "user", "content": [RED, IMAGE, BLUE, IMAGE]}]
    sample = {"prompt": prompt, "images": [tiny_image(0), tiny_image(1)]}
    seen = privileged_sample({**sample, "privileged_images": [tiny_image(2), tiny_image(3)]}, mode)
    assert seen["prompt"] == [prompt[0], {"role": "user", "content": content}]
    assert [image.tobytes() for image in seen["images"]] == [tiny_image(seed).tobytes() for seed in seeds]
    assert len(encode_prompts(tiny_processor(), [seen])[2]["image_grid_thw"]) == len(seeds)
    assert prompt[1]["content"] == [RED, IMAGE, BLUE, IMAGE], "the sample itself must not change"
    assert privileged_sample(sample, mode) == sample


def test_images_before_the_text_need_no_places() -> None:
    sample = {"prompt": [{"role": "user", "content": "red ?"}], "images": [], "privileged_images": [tiny_image(2)]}
    assert privileged_sample(sample)["prompt"] == sample["prompt"]
