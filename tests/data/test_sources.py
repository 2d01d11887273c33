"""Samples from local files, and their errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image
from tiny import tiny_image

from vgs.data.sources import DataSource, load_samples
from vgs.errors import ConfigError


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    tiny_image(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def pixels(image: Image.Image) -> bytes:
    return image.tobytes()


def write_jsonl(folder: Path, rows: list[dict]) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_privileged_columns(tmp_path: Path) -> None:
    """What only a teacher sees, under its own names."""
    for seed in (1, 2, 3):
        tiny_image(seed).save(tmp_path / f"{seed}.png")
    rows = [
        {"question": "red ?", "answer": "a", "images": "1.png", "crops": ["2.png", "3.png"], "note": "i see red"},
        {"question": "blue ?", "answer": "b", "images": "1.png", "crops": None, "note": None},
    ]
    columns = {"privileged_images": "crops", "privileged_text": "note"}
    first, second = load_samples(DataSource(write_jsonl(tmp_path, rows), **columns))
    assert [pixels(x) for x in first["privileged_images"]] == [pixels(tiny_image(seed)) for seed in (2, 3)]
    assert (first["privileged_text"], second["privileged_images"], second["privileged_text"]) == ("i see red", [], None)
    plain = load_samples(DataSource(write_jsonl(tmp_path, rows)))[0]
    assert set(plain) == {"prompt", "images", "answer"}
    with pytest.raises(ValueError, match="has no column 'parts'; its columns are"):
        load_samples(DataSource(write_jsonl(tmp_path, rows), privileged_images="parts"))


def test_jsonl_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for seed in (1, 2):
        tiny_image(seed).save(tmp_path / "pictures" / f"{seed}.png")
    rows = [
        {"problem": "<image>\nred ?", "solution": 7, "picture": "pictures/1.png"},
        {"problem": "green ?", "solution": "b", "picture": "pictures/2.png"},
    ]
    source = DataSource(
        write_jsonl(tmp_path, rows),
        question="problem",
        answer="solution",
        images="picture",
        system_prompt="answer",
    )
    samples = load_samples(source)
    assert len(samples) == 2
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red ?"}]}
    assert samples[0]["prompt"] == [{"role": "system", "content": "answer"}, user]
    assert samples[0]["answer"] == "7"
    assert pixels(samples[1]["images"][0]) == pixels(tiny_image(2))


def test_parquet_with_bytes_lists_and_a_folder(tmp_path: Path) -> None:
    for shard in range(2):
        columns = {
            "question": ["red ?", "blue ?"],
            "answer": ["a", "b"],
            "images": [[png(shard)], [png(shard), png(9)]],
        }
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"part-{shard}.parquet")
    samples = load_samples(DataSource(str(tmp_path), limit=3))
    assert [len(x["images"]) for x in samples] == [1, 2, 1]
    assert pixels(samples[2]["images"][0]) == pixels(tiny_image(1))


def test_image_features_and_saved_datasets(tmp_path: Path) -> None:
    columns = {"question": ["red ?"], "gold": ["a"], "image": [tiny_image(3)]}
    rows = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "data.parquet")
    for path in (tmp_path / "saved", tmp_path / "data.parquet"):
        (sample,) = load_samples(DataSource(str(path), answer=None, images="image"))
        assert pixels(sample["images"][0]) == pixels(tiny_image(3))
        assert "answer" not in sample


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, [{"problem": "red ?", "answer": "a", "images": None}])
    with pytest.raises(ValueError, match="no column 'question'; its columns are problem, answer, images"):
        load_samples(DataSource(path))


@pytest.mark.parametrize("image", ["missing.png", "broken.png"])
def test_an_unreadable_image_is_named_with_its_row(tmp_path: Path, image: str) -> None:
    tiny_image(0).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    rows = [{"question": "red ?", "answer": "a", "images": name} for name in ("good.png", image)]
    samples = load_samples(DataSource(write_jsonl(tmp_path, rows)))
    assert samples[0]["images"]
    with pytest.raises(ValueError, match=rf"Row 1 of .*data.jsonl: cannot read 'images': .*{image}"):
        samples[1]


def test_paths_that_cannot_be_data(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing.parquet' does not exist"):
        load_samples(DataSource("nothing.parquet"))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"of one format out of \.parquet, \.jsonl"):
        load_samples(DataSource(str(tmp_path / "notes.txt")))
    with pytest.raises(ValueError, match="found none"):
        load_samples(DataSource(str(tmp_path)))
