"""Bad rows are found before training, by their numbers."""

from __future__ import annotations

import importlib
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from tiny import tiny_image, tiny_processor

from vgs.data import checks
from vgs.data.checks import check_rows, data_fingerprint, good_rows
from vgs.data.sources import DataSource, Samples, load_samples
from vgs.errors import ConfigError
from vgs.models.tokenizers import media_tokens


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    return buffer.getvalue()


def bad_rows(folder: Path) -> list[dict[str, Any]]:
    """Rows 1 to 6 cannot be used, row 5 only by some processors, row 6 only by some vocabularies."""
    good = jpeg(tiny_image(0, width=64))
    for name, data in (
        ("good.jpg", good),
        ("truncated.jpg", good[: len(good) // 2]),
        ("text.jpg", b"no picture"),
        ("long.png", None),
    ):
        if data is None:
            Image.new("RGB", (2048, 9)).save(folder / name)
        else:
            (folder / name).write_bytes(data)
    rows = [
        ("red ?", "a", "good.jpg"),
        ("red ?", "a", "truncated.jpg"),
        ("red ?", "a", ["good.jpg", "missing.jpg"]),
        ("red ?", {"gold": "a"}, "good.jpg"),
        ("<image> <image> ?", "a", "good.jpg"),
        ("red ?", "a", "long.png"),
        ("red <|image_pad|> ?", "a", None),
        ("blue ?", None, "good.jpg"),
    ]
    return [dict(zip(("question", "answer", "images"), row, strict=True)) for row in rows]


def load(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Samples:
    path = folder / "data.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return load_samples(DataSource(str(path), **options))


def test_every_bad_row_is_named(tmp_path: Path) -> None:
    samples = load(tmp_path, bad_rows(tmp_path))
    found = check_rows(samples, tiny_processor(), progress=False)
    assert [(problem.row, problem.column) for problem in found] == [
        *((1, "images"), (2, "images"), (3, "answer"), (4, "question"), (5, "images"), (6, "question"))
    ]
    for problem, says in zip(
        found,
        ("truncated", "missing.jpg", "expected text", "2 places for images", "2048 x 9 pixels", "holds <|image_pad|>"),
        strict=True,
    ):
        assert says in problem.sentence
        assert str(problem).startswith(f"row {problem.row}: ")
        assert repr(problem.column) in problem.sentence
    assert [problem.row for problem in check_rows(samples, progress=False)] == [1, 2, 3, 4], "no processor is known"
    assert [problem.row for problem in check_rows(samples, tokens=["red"], progress=False)] == [0, 1, 2, 3, 4, 5, 6]


def test_bad_rows_stop_a_run_or_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = bad_rows(tmp_path)
    with pytest.raises(
        ConfigError, match=r"data.jsonl: 6 of 8 rows cannot be used \(row 1: cannot read 'images': .*on_bad_row: skip"
    ):
        good_rows(load(tmp_path, rows), tiny_processor())
    samples = load(tmp_path, rows, on_bad_row="skip")
    assert list(samples.indices) == [0, 5, 6, 7], "what no processor is needed for is skipped at once"
    assert "4 of 8 rows cannot be used and are skipped: rows 1, 2, 3, 4 (row 1: cannot read 'images'" in caplog.text
    kept = good_rows(samples, tiny_processor())
    assert [sample["answer"] for sample in kept] == ["a", None]
    assert "2 of 4 rows cannot be used and are skipped: rows 5, 6" in caplog.text
    assert good_rows(kept, tiny_processor()) is kept
    with pytest.raises(ConfigError, match="no row can be used"):
        load(tmp_path, rows[1:3], on_bad_row="skip")


def test_results_are_kept_until_data_or_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = checks._row_problem

    def counted(samples: Samples, index: int, **options: Any) -> Any:
        asked.append(index)
        return original(samples, index, **options)

    monkeypatch.setattr(checks, "_row_problem", counted)
    rows = bad_rows(tmp_path)
    rows = [rows[0], rows[7]]

    def look(expected: int, *arguments: Any) -> None:
        asked.clear()
        good_rows(load(tmp_path, rows), *arguments)
        assert len(asked) == expected

    look(2)
    look(0)
    look(2, tiny_processor())
    processor = tiny_processor()
    processor.tokenizer("red ?", padding="max_length", max_length=9)  # calls change a tokenizer's settings
    look(0, processor)
    processor.image_processor.patch_size = 16
    look(2, processor)
    rows[0]["question"] = "blue ?"
    look(2)
    Image.new("RGB", (33, 33)).save(tmp_path / "good.jpg")
    look(2)
    look(0)


def test_the_fingerprint_knows_picture_files_within_messages(tmp_path: Path) -> None:
    tiny_image(0).save(tmp_path / "0.png")
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "0.png"}, {"type": "text", "text": "a"}]}
            ]
        }
    ]
    before = data_fingerprint(load(tmp_path, rows))
    assert data_fingerprint(load(tmp_path, rows)) == before
    tiny_image(1, width=64).save(tmp_path / "0.png")
    assert data_fingerprint(load(tmp_path, rows)) != before


def test_the_fingerprint_of_pictures_in_a_table_reads_no_picture(tmp_path: Path) -> None:
    columns = {"question": ["red ?"], "answer": ["a"], "images": [[jpeg(tiny_image(0))]]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "data.parquet")
    samples = load_samples(DataSource(str(tmp_path / "data.parquet")))
    assert list(checks._file_states(samples)) == []
    assert len(data_fingerprint(samples)) == 16


def test_media_tokens_are_those_of_images_and_their_kin() -> None:
    found = media_tokens(tiny_processor())
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"} <= set(found)
    assert not {"<|im_start|>", "<|im_end|>", "red"} & set(found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixtral_processor", {"[IMG]", "[IMG_BREAK]", "[IMG_END]"}),
        ("internvl_processor", {"<IMG_CONTEXT>", "<img>", "</img>", "<video>"}),
    ],
)
def test_media_tokens_of_real_processors(tmp_path: Path, name: str, expected: set[str]) -> None:
    processor = getattr(importlib.import_module("real_processors"), name)()
    processor.tokenizer.add_tokens(["picture of an image"])  # an added word is no special token
    assert set(media_tokens(processor)) - set(media_tokens(tiny_processor())) == expected
    rows = [{"question": f"{token} ?", "answer": "a", "images": None} for token in ("image", *sorted(expected))]
    found = check_rows(load(tmp_path, rows), processor, progress=False)
    assert [problem.row for problem in found] == list(range(1, len(rows)))
