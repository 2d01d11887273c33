"""``vgs init``: what it writes is taken by ``vgs check`` as it is, for data of many kinds."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import yaml
from real_checkpoints import photos, real_checkpoint

from vgs.cli import main as cli


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    real_checkpoint("qwen2_5_vl", root / "student")
    real_checkpoint("qwen2_5_vl", root / "teacher", teacher=True)
    photos(root / "photos", 12)
    return root


@pytest.fixture(autouse=True)
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(models: Path, count: int, question: str = "question", image: str | None = "image") -> list[dict]:
    paths = sorted((models / "photos").iterdir())[:count]
    found = [{question: "what is in the picture ?", "answer": "seven"} for _ in paths]
    return [row | ({} if image is None else {image: str(x)}) for row, x in zip(found, paths, strict=True)]


def written(models: Path, data: str) -> dict:
    """The config that ``vgs init`` writes, which ``vgs check`` has taken."""
    arguments = ["--student", str(models / "student"), "--teacher", str(models / "teacher"), "--data", data]
    assert cli.main(["init", *arguments, "--out", "my.yaml"]) == 0
    assert cli.main(["check", "my.yaml"]) == 0
    return yaml.safe_load(Path("my.yaml").read_text())


def save(content: list[dict], name: str = "data.jsonl") -> str:
    Path(name).write_text("\n".join(map(json.dumps, content)))
    return name


def test_plain_questions(models: Path) -> None:
    config = written(models, save(rows(models, 12)))
    assert config["objective"] == "vgs" and config["training"]["eta"] == "measure"
    assert config["data"]["train"] == {"path": "data.jsonl", "split": "train[:-1]"}
    assert config["data"]["eval"] == {"path": "data.jsonl", "split": "train[-1:]"}
    assert config["training"]["max_prompt_length"] + config["training"]["max_completion_length"] <= 1024
    assert config["training"]["per_device_train_batch_size"] == 8
    assert "12 rows; pictures from 48 x 32 to 32 x 64 pixels" in Path("my.yaml").read_text()


def test_other_names_of_columns(models: Path) -> None:
    config = written(models, save(rows(models, 3, "problem", "img")))
    assert config["data"] == {"train": {"path": "data.jsonl", "question": "problem", "images": "img"}}
    assert config["training"]["per_device_train_batch_size"] == 3


def test_splits_of_a_folder(models: Path) -> None:
    Path("data").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows(models, 4)).to_parquet(f"data/{split}-00000-of-00001.parquet")
    config = written(models, "data")
    assert [config["data"][part]["split"] for part in ("train", "eval")] == ["train", "test"]
    assert config["training"]["eval_strategy"] == "steps"


def test_chat_messages(models: Path) -> None:
    content = []
    for path in sorted((models / "photos").iterdir())[:4]:
        parts = [{"type": "image", "image": str(path)}, {"type": "text", "text": "what is in the picture ?"}]
        content.append({"messages": [{"role": "user", "content": parts}]})
    config = written(models, save(content))
    assert config["data"] == {"train": {"path": "data.jsonl"}}


def test_rows_that_cannot_be_used_are_skipped(models: Path) -> None:
    content = rows(models, 4)
    content[2]["image"] = "nowhere.jpg"
    assert written(models, save(content))["data"]["train"]["on_bad_row"] == "skip"
    assert "4 rows, 1 of which cannot be used" in Path("my.yaml").read_text()


def test_questions_without_pictures_are_not_steered(models: Path) -> None:
    content = [*rows(models, 3), {"question": "seven or nine ?", "answer": "seven", "image": None}]
    config = written(models, save(content))
    assert config["objective"] == "opd" and "gamma" not in config["training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"--data": "none.jsonl"}, "data path 'none.jsonl' does not exist"),
        ({"--student": "nowhere"}, "student.path 'nowhere' cannot be loaded"),
        ({"--out": "there.yaml"}, "--out 'there.yaml' exists already"),
        ({"--data": "odd.jsonl"}, "has no column that looks like questions; its columns are a, b"),
    ],
)
def test_what_cannot_be_written(
    models: Path, capsys: pytest.CaptureFixture, arguments: dict[str, str], message: str
) -> None:
    Path("there.yaml").write_text("x: 1")
    save([{"a": 1, "b": 2}], "odd.jsonl")
    given = {"--student": str(models / "student"), "--teacher": str(models / "teacher")}
    given |= {"--data": save(rows(models, 2)), "--out": "my.yaml", **arguments}
    with pytest.raises(SystemExit) as stop:
        cli.main(["init", *(word for pair in given.items() for word in pair)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert Path("there.yaml").read_text() == "x: 1" and not Path("my.yaml").exists()
