"""Lengths of prompts of real processors: those of the encodings, whether they are counted or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from covering import slow_beyond
from PIL import Image
from real_checkpoints import REAL_FAMILIES
from transformers import AutoProcessor

from vgs.data.lengths import drop_long_prompts, prompt_length, prompt_lengths
from vgs.data.sources import DataSource, Samples, load_samples
from vgs.errors import ConfigError

#: Rules of several kinds for what a picture takes; the others are asked by the slow tests.
USUAL = ("qwen3_vl", "internvl", "llava_next", "llava_pixtral", "gemma4", "smolvlm")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Rows with no, one, or two pictures of many shapes."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    generator = np.random.default_rng(0)
    for row in range(24):
        names = [f"{row}_{place}.jpg" for place in range(row % 3)]
        for name in names:
            width, height = (int(side) for side in generator.integers(16, 100, 2))
            Image.new("RGB", (width, height)).save(folder / name)
        rows.append({"question": "what is in the picture ? " * (1 + row % 2), "answer": "a", "images": names})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_samples(DataSource(str(folder / "data.jsonl")))


@pytest.mark.parametrize("family", slow_beyond(USUAL, REAL_FAMILIES))
def test_lengths_are_those_of_the_encodings(family: str, checkpoint: Callable[..., Path], samples: Samples) -> None:
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    expected = [prompt_length(processor, sample) for sample in samples]
    assert prompt_lengths(samples, processor) == expected
    limit = sorted(expected)[12]
    kept = drop_long_prompts(samples, processor, limit)
    assert len(kept) == sum(length <= limit for length in expected)
    with pytest.raises(ConfigError, match=f"at most max_prompt_length={min(expected) - 1}"):
        drop_long_prompts(samples, processor, min(expected) - 1)


def test_a_picture_of_one_tile(checkpoint: Callable[..., Path]) -> None:
    """InternVL: four tokens of a 32 x 32 picture, a start, an end and a line break."""
    processor = AutoProcessor.from_pretrained(checkpoint("internvl"))
    message = [{"role": "user", "content": "seven ?"}]
    plain, shown = ({"prompt": message, "images": x} for x in ([], [Image.new("RGB", (32, 32))]))
    assert prompt_length(processor, shown) == prompt_length(processor, plain) + 7
