"""Prompt lengths: those of the encodings, from headers where that is exact, and once."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_image, tiny_processor

from vgs.data import sources
from vgs.data.lengths import PROBES, drop_long_prompts, prompt_length, prompt_lengths
from vgs.data.prompts import encode_prompts
from vgs.data.sources import DataSource, Samples, load_samples
from vgs.errors import ConfigError


def load(folder: Path, rows: list[dict[str, Any]]) -> Samples:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_samples(DataSource(str(path)))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every picture that is decoded, while it still is."""
    seen: list[Any] = []
    original = sources.decode_image

    def counted(value: Any, *arguments: Any) -> Image.Image:
        seen.append(value)
        return original(value, *arguments)

    monkeypatch.setattr(sources, "decode_image", counted)
    return seen


def photos(folder: Path, count: int = 30) -> list[dict[str, Any]]:
    """Rows with no, one, or two photos of many shapes, some of them turned; marks in some."""
    generator = np.random.default_rng(0)
    rows = []
    for row in range(count):
        names = []
        for place in range(row % 3):
            width, height = (int(side) for side in generator.integers(9, 128, 2))
            exif = Image.Exif()
            exif[0x0112] = int(generator.integers(1, 9))
            names.append(f"{row}_{place}.jpg")
            Image.new("RGB", (width, height)).save(folder / names[-1], exif=exif)
        question = ("red ?", "what is in the picture ?", "red <image> or <image> ?")[row % 3]
        rows.append({"question": question, "answer": "a", "images": names})
    return rows


@pytest.mark.parametrize("name", ["internvl_processor", "pixtral_processor"])
def test_headers_are_enough_where_the_processor_counts(tmp_path: Path, name: str, decoded: list[Any]) -> None:
    processor = getattr(importlib.import_module("real_processors"), name)()
    samples = load(tmp_path, photos(tmp_path))
    lengths = prompt_lengths(samples, processor)
    assert 0 < len(decoded) <= 3 * PROBES, "one or two pictures of a few rows, and none of the others"
    assert lengths == [prompt_length(processor, sample) for sample in samples]
    assert len(set(lengths)) > 5
    decoded.clear()
    assert prompt_lengths(load_samples(samples.source), processor) == lengths
    assert not decoded, "kept on disk"
    assert prompt_lengths(samples.select([4, 2]), processor) == [lengths[4], lengths[2]]


def test_a_count_that_is_wrong_is_not_believed(tmp_path: Path) -> None:
    from real_processors import internvl_processor

    processor = internvl_processor()
    original = processor._get_num_multimodal_tokens

    def wrong(image_sizes: list[tuple[int, int]]) -> Any:
        data = original(image_sizes=image_sizes)
        data.num_image_tokens = [
            count + (height > 100) for count, (height, _) in zip(data.num_image_tokens, image_sizes, strict=True)
        ]
        return data

    processor._get_num_multimodal_tokens = wrong
    samples = load(tmp_path, photos(tmp_path))
    assert prompt_lengths(samples, processor) == [prompt_length(processor, sample) for sample in samples]


def test_a_length_is_that_of_the_encoding() -> None:
    processor = tiny_processor()
    wide = {"prompt": [{"role": "user", "content": "red ?"}], "images": [tiny_image(0), tiny_image(1, width=64)]}
    assert prompt_length(processor, wide) == encode_prompts(processor, [wide])[0].shape[1] == 7 + 2 * 2 + 4 + 8


def test_long_prompts_are_dropped_counted_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    questions = ["red ?", "what is in the picture ? " * 4, "blue ?"]
    rows = [{"question": question, "answer": "a", "images": "0.png"} for question in questions]
    processor, samples = tiny_processor(), load(tmp_path, rows)
    limit = prompt_length(processor, samples[0])
    assert limit == 2 + 6 + 2 + 1 + 2  # <|im_start|> user, the image's tokens, two words, <|im_end|>, assistant's start
    kept = drop_long_prompts(samples, processor, limit)
    assert [x["prompt"][0]["content"] for x in kept] == ["red ?", "blue ?"]
    assert "1 of 3 prompts are longer than 13 tokens: dropped (rows 1)" in caplog.text
    with pytest.raises(ConfigError, match="at most max_prompt_length=3"):
        drop_long_prompts(samples, processor, 3)


def test_nothing_dropped_is_nothing_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = load(tmp_path, [{"question": "red ?", "answer": "a", "images": None}])
    assert len(drop_long_prompts(samples, tiny_processor(), 100)) == 1
    assert not caplog.records


def test_lengths_are_kept_for_data_processor_and_template(tmp_path: Path, decoded: list[Any]) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    table = {"question": ["red ?"] * 3, "answer": ["a"] * 3, "images": [(tmp_path / "0.png").read_bytes()] * 3}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "data.parquet")
    samples = load_samples(DataSource(str(tmp_path / "data.parquet")))

    def look(expected: int, processor: Any = None, **options: Any) -> None:
        decoded.clear()
        prompt_lengths(samples, processor or tiny_processor(), **options)
        assert len(decoded) == expected

    look(3)
    look(0)
    look(3, add_vision_id=True)
    other = tiny_processor()
    other.chat_template += "{# other #}"
    look(3, other)


@pytest.mark.parametrize("name", ["0.png", "broken.png"])
def test_a_row_that_cannot_be_encoded_is_named(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (2048, 9)).save(tmp_path / "0.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [{"question": "red ?", "answer": "a", "images": image} for image in (None, name)]
    with pytest.raises(ConfigError, match=r"^Row 1 of .*(cannot be encoded: absolute aspect ratio|no picture)"):
        prompt_lengths(load(tmp_path, rows), tiny_processor())
