"""Control images: nothing to see, and as many tokens as the original."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_image, tiny_processor

from vgs.data.degraded import CONTROLS, control_groups, control_images
from vgs.data.prompts import encode_groups, encode_prompts


@pytest.mark.parametrize("kind", CONTROLS)
def test_same_sizes_and_placeholders(kind: str) -> None:
    images = [tiny_image(0, 64, 32), tiny_image(1, 7, 33).convert("L"), tiny_image(2).convert("RGBA")]
    controls = control_images(images, kind)
    assert [(x.size, x.mode) for x in controls] == [(x.size, "RGB") for x in images]
    processor = tiny_processor()
    message = [{"role": "user", "content": "red ?"}]
    ours, theirs = (encode_prompts(processor, [{"prompt": message, "images": [x[0]]}])[0] for x in (images, controls))
    assert ours.tolist() == theirs.tolist()


def test_black_is_black() -> None:
    assert not np.asarray(control_images([tiny_image(0)], "black")[0]).any()


def test_pixelated_keeps_coarse_blocks() -> None:
    """Ten by ten pixels become one: averages of their surroundings, whose own average stays."""
    image = tiny_image(3, 80, 40)
    before, after = (np.asarray(x, dtype=float) for x in (image, control_images([image], "pixelated")[0]))
    blocks = after.reshape(4, 10, 8, 10, 3)
    assert np.ptp(blocks, axis=(1, 3)).max() == 0
    assert len(np.unique(blocks[:, 0, :, 0], axis=0)) > 1
    assert np.abs(before.mean(axis=(0, 1)) - after.mean(axis=(0, 1))).max() < 5
    assert after.std() < 0.3 * before.std()


def test_noise_is_the_seeds() -> None:
    images = [Image.new("RGB", (64, 64), "white")] * 2
    first, again, other = (control_images(images, "noise", seed) for seed in (0, 0, 1))
    values = [np.asarray(x, dtype=float) for x in (*first, *again, *other)]
    assert np.array_equal(values[0], values[2]) and np.array_equal(values[1], values[3])
    assert not np.array_equal(values[0], values[1]) and not np.array_equal(values[0], values[4])
    assert values[0].mean() == pytest.approx(127.5, abs=2) and values[0].std() == pytest.approx(62, abs=3)


def test_groups_are_degraded_each_by_its_own_sample() -> None:
    """Two images of different sizes, one image, and none."""
    processor, options = tiny_processor(), {"forbidden": (), "device": torch.device("cpu")}
    samples = [
        {"prompt": [{"role": "user", "content": "red ?"}], "images": images}
        for images in ([tiny_image(0, 64), tiny_image(1)], [tiny_image(2, 32, 64)], [])
    ]
    responses = [[[20, 1], [21]], [[22]], [[23, 1]]]
    groups = encode_groups(processor, samples, responses, **options)
    controls = control_groups(processor, samples, groups, "pixelated")
    blurred = [{**sample, "images": control_images(sample["images"], "pixelated")} for sample in samples]
    expected = encode_groups(processor, blurred, responses, **options)
    for control, group, other in zip(controls, groups, expected, strict=True):
        assert torch.equal(control.prompt_ids, group.prompt_ids)
        assert [x.tolist() for x in control.responses] == [x.tolist() for x in group.responses]
        assert control.images.keys() == other.images.keys()
        assert all(torch.equal(control.images[name], value) for name, value in other.images.items())
    assert controls[2] is groups[2]
    for control, group in zip(controls[:2], groups[:2], strict=True):
        assert not torch.equal(control.images["pixel_values"], group.images["pixel_values"])


def test_samples_that_are_not_the_groups_are_refused() -> None:
    processor = tiny_processor()
    long, short = (
        {"prompt": [{"role": "user", "content": text}], "images": [tiny_image(0)]} for text in ("red ?", "?")
    )
    groups = encode_groups(processor, [long], [[[20]]], (), torch.device("cpu"))
    with pytest.raises(ValueError, match="samples must be those that the groups were made of"):
        control_groups(processor, [short], groups, "black")


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of black, pixelated, noise, got 'blur'"):
        control_images([], "blur")
