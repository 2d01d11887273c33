"""Files and folders as people have them, written by the libraries that write them."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_image

from vgs.data.formats import DataNotFound
from vgs.data.sources import DataSource, load_samples
from vgs.errors import ConfigError

Rows = list[dict[str, Any]]


def rows(first: int, count: int = 2) -> Rows:
    return [{"question": f"number {i} ?", "answer": str(i), "images": None} for i in range(first, first + count)]


def write(path: Path, data: Rows) -> Path:
    """A file of rows in the format of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name
    opened = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open)
    if opened is not open:
        name = path.stem
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(data), path)
        return path
    if name.endswith(".arrow"):
        table = pa.Table.from_pylist(data)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return path
    with opened(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".json"):
            json.dump(data, file)
        elif name.endswith((".csv", ".tsv")):
            writer = csv.DictWriter(file, list(data[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(data)
        else:
            file.writelines(json.dumps(row) + "\n" for row in data)
    return path


def answers(path: Path | str, **options: Any) -> list[str | None]:
    return [sample["answer"] for sample in load_samples(DataSource(str(path), **options))]


FILES = ("parquet", "jsonl", "json", "jsonl.gz", "json.gz", "csv", "tsv", "csv.gz", "tsv.gz", "ndjson", "arrow")


@pytest.mark.parametrize("name", [*FILES, "jsonl.bz2", "jsonl.xz"])
def test_every_format(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / f"data.{name}", rows(0))
    assert answers(file) == answers(tmp_path) == ["0", "1"]
    samples = load_samples(DataSource(str(file), answer=None))
    assert samples[1] == {"prompt": [{"role": "user", "content": "number 1 ?"}], "images": []}


def test_upper_case_names(tmp_path: Path) -> None:
    assert answers(write(tmp_path / "A.JSONL", rows(0))) == ["0", "1"]


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    """Neither "007" nor "NA" nor "1e3" changes, and only an empty cell is null."""
    golds = ["007", "NA", "None", "1e3", "", "2.50", "True", 'say "yes", no\nmore', "null"]
    data = [{"question": "red ?", "answer": gold, "images": ""} for gold in golds]
    for name in ("data.csv", "data.tsv", "data.csv.gz"):
        assert answers(write(tmp_path / name, data)) == [gold or None for gold in golds]
    excel = "\ufeff" + "question;answer;images\r\nred, blue ?;3,5;\r\n"
    (tmp_path / "excel.csv").write_text(excel, encoding="utf-8")
    (sample,) = load_samples(DataSource(str(tmp_path / "excel.csv")))
    assert (sample["prompt"][0]["content"], sample["answer"]) == ("red, blue ?", "3,5")


def test_several_images_in_a_cell(tmp_path: Path) -> None:
    for seed in (1, 2):
        tiny_image(seed).save(tmp_path / f"{seed}.png")
    data = [{"question": "red ?", "answer": "a", "images": cell} for cell in ('["1.png", "2.png"]', "2.png", "")]
    samples = load_samples(DataSource(str(write(tmp_path / "data.csv", data))))
    assert [[image.tobytes() for image in sample["images"]] for sample in samples] == [
        [tiny_image(1).tobytes(), tiny_image(2).tobytes()],
        [tiny_image(2).tobytes()],
        [],
    ]


SPLIT_FILES = [
    ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"),
    ("data/train-a.parquet", "data/train-b.parquet", "data/test-a.parquet"),
    ("train_0.jsonl", "train_1.jsonl", "test.jsonl"),
    ("train/a.jsonl.gz", "train/b.jsonl.gz", "test/a.jsonl.gz"),
    ("training.1.csv", "training.2.csv", "my test.csv"),
]


@pytest.mark.parametrize("names", SPLIT_FILES, ids=lambda names: names[0].replace("/", "-"))
def test_the_split_of_a_folder(tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, rows(10 * number))
    tiny_image(0).save(tmp_path / "train_picture.png")
    assert answers(tmp_path, split="train") == ["0", "1", "10", "11"]
    assert answers(tmp_path, split="test") == ["20", "21"]
    assert answers(tmp_path, split="test[:1]+train[2:]") == ["20", "10", "11"]
    assert answers(tmp_path, split="all")
    caplog.clear()
    assert answers(tmp_path) == ["0", "1", "10", "11"]
    assert "has the splits train, test: train is used" in caplog.text
    with pytest.raises(ConfigError, match=r"has no split 'validation'; its splits are train, test\."):
        answers(tmp_path, split="validation")


def test_splits_without_train_must_be_named(tmp_path: Path) -> None:
    for number, name in enumerate(("dev.jsonl", "test.jsonl")):
        write(tmp_path / name, rows(10 * number))
    assert answers(tmp_path, split="validation") == ["0", "1"]
    with pytest.raises(ConfigError, match="has the splits validation, test: say which one"):
        answers(tmp_path)


def test_a_file_has_one_split(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", rows(0, 4))
    assert answers(file, split="train[1:3]") == ["1", "2"]
    with pytest.raises(ConfigError, match="has no split 'test'; its splits are train"):
        answers(file, split="test")


@pytest.mark.parametrize("split", ["train", "test"])
def test_saved_dataset_dicts(tmp_path: Path, split: str) -> None:
    parts = {name: datasets.Dataset.from_list(rows(n)) for n, name in ((0, "train"), (10, "test"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert answers(tmp_path / "saved", split=split) == (["0", "1"] if split == "train" else ["10", "11"])
    with pytest.raises(ConfigError, match="no split 'dev'; its splits are train, test"):
        answers(tmp_path / "saved", split="dev")
    assert answers(tmp_path / "saved" / split) == answers(tmp_path / "saved", split=split), "one of them alone"


def test_saved_datasets_know_their_split(tmp_path: Path) -> None:
    datasets.Dataset.from_list(rows(0)).save_to_disk(tmp_path / "plain")
    datasets.Dataset.from_list(rows(0), split="test").save_to_disk(tmp_path / "test")
    assert answers(tmp_path / "plain") == answers(tmp_path / "plain", split="train") == ["0", "1"]
    assert answers(tmp_path / "test") == answers(tmp_path / "test", split="test") == ["0", "1"]
    for name, split in (("plain", "test"), ("test", "train")):
        with pytest.raises(ConfigError, match=f"has no split '{split}'"):
            answers(tmp_path / name, split=split)


@pytest.mark.parametrize("stray", ["notes.json", "old.jsonl", "more.csv", "sub/deep.json"])
def test_a_stray_file_of_another_format(tmp_path: Path, stray: str) -> None:
    write(tmp_path / "a.parquet", rows(0))
    write(tmp_path / "b.parquet", rows(2))
    write(tmp_path / stray, rows(4))
    with pytest.raises(ConfigError, match=rf"of one format out of .*; found (.*, )?{stray}") as error:
        answers(tmp_path)
    assert "a.parquet" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_data_does_not_disturb(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(0))
    for name in ("README.md", "LICENSE.txt", ".hidden.json", "dataset_infos.json", "convert.py", "run.yaml"):
        (tmp_path / name).write_text("{}")
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache" / "x.json", rows(0))
    (tmp_path / "train").mkdir()
    tiny_image(0).save(tmp_path / "train" / "1.png")
    assert answers(tmp_path) == ["0", "1"]


def test_files_that_belong_to_no_split_are_said(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(0))
    write(tmp_path / "extra.jsonl", rows(2))
    with pytest.raises(ConfigError, match=r"1 beside them that belong to none: extra\.jsonl"):
        answers(tmp_path)


def test_a_folder_of_pictures_with_metadata(tmp_path: Path) -> None:
    for split, seeds in (("train", (1, 2)), ("test", (3,))):
        for seed in seeds:
            (tmp_path / split).mkdir(exist_ok=True)
            tiny_image(seed).save(tmp_path / split / f"{seed}.png")
        data = [{"file_name": f"{seed}.png", "question": "red ?", "answer": seed} for seed in seeds]
        write(tmp_path / split / "metadata.jsonl", data)
    for split, seeds in (("train", (1, 2)), ("test", (3,))):
        samples = load_samples(DataSource(str(tmp_path), split=split))
        assert [sample["answer"] for sample in samples] == [str(seed) for seed in seeds]
        assert [sample["images"][0].tobytes() for sample in samples] == [tiny_image(seed).tobytes() for seed in seeds]
    with pytest.raises(ConfigError, match="no split 'validation'; its splits are"):
        load_samples(DataSource(str(tmp_path), split="validation"))


def test_a_copy_of_a_hub_dataset_with_configs(tmp_path: Path) -> None:
    write(tmp_path / "easy" / "one.jsonl", rows(0))
    write(tmp_path / "hard" / "one.jsonl", rows(10))
    configs = [
        {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/*.jsonl"}]} for name in ("easy", "hard")
    ]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n# Data\n")
    assert answers(tmp_path, subset="hard") == ["10", "11"]
    with pytest.raises(ConfigError, match="Config name is missing"):
        answers(tmp_path)


def test_options_without_effect_are_errors(tmp_path: Path) -> None:
    file = write(tmp_path / "data.jsonl", rows(0))
    for path in (file, tmp_path):
        with pytest.raises(ConfigError, match="subset='a' has no effect"):
            answers(path, subset="a")
        with pytest.raises(ConfigError, match="revision='main' belongs to a dataset on the hub"):
            answers(path, revision="main")
    with pytest.raises(ConfigError, match="must be a whole number above 0, got 0"):
        answers(file, limit=0)
    with pytest.raises(ConfigError, match=r"on_bad_row of .* must be one of error, skip, got 'drop'"):
        answers(file, on_bad_row="drop")


@pytest.mark.parametrize("name", ["data.jsonl", "data.parquet", "data.csv", "data.json", "data.jsonl.gz", "data.arrow"])
@pytest.mark.parametrize("content", [b"", b"\x00\x01 no data {"])
def test_broken_files_are_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        answers(tmp_path / name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_that_do_not_exist(tmp_path: Path) -> None:
    for path in ("nothing.parquet", str(tmp_path / "nothing"), "./nothing", "nothing.jsonl.gz"):
        with pytest.raises(DataNotFound, match="does not exist"):
            answers(path)
    assert issubclass(DataNotFound, FileNotFoundError)
    assert issubclass(DataNotFound, ConfigError)


def test_undecoded_images_at_every_depth(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Image features are read by the one reader, wherever they are, with the pixels of the file."""
    image = datasets.Image()
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": image}
    features = datasets.Features(
        {
            "prompt": [{"role": datasets.Value("string"), "content": [part]}],
            "images": datasets.List(image),
            "answer": datasets.Value("string"),
        }
    )
    content = [
        {"type": "text", "text": "red ?", "image": None},
        {"type": "image", "text": None, "image": tiny_image(1)},
        {"type": "image", "text": None, "image": None},
    ]
    data = [{"prompt": [{"role": "user", "content": content}], "images": [tiny_image(2)], "answer": "a"}]
    table = datasets.Dataset.from_list(data, features=features)
    table.to_parquet(tmp_path / "data.parquet")
    table.save_to_disk(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        for path in (tmp_path / "data.parquet", tmp_path / "saved"):
            (sample,) = load_samples(DataSource(str(path)))
            assert sample["prompt"][0]["content"] == [{"type": "text", "text": "red ?"}, *[{"type": "image"}] * 2]
            assert [x.tobytes() for x in sample["images"]] == [tiny_image(seed).tobytes() for seed in (1, 2)]
    assert not caplog.text
