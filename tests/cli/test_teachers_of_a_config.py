"""Teachers as a config names them: several by a column, elsewhere, or recorded; each mistake is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from real_checkpoints import photos
from teachers import FAMILY, command, refused
from tiny import trainer_options

from vgs.cli.config import check_config
from vgs.cli.resolved import as_yaml, resolved, training_arguments
from vgs.errors import ConfigError

DOMAINS = ("math", "charts", "math", "charts")


@pytest.fixture
def config(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """A run with two teachers by the column ``domain``; the working directory is there."""
    paths = photos(tmp_path / "photos")
    rows = [
        {"question": "what is in the picture ?", "answer": "seven", "images": [f"photos/{x.name}"], "domain": name}
        for x, name in zip(paths, DOMAINS, strict=True)
    ]
    write(tmp_path, rows)
    monkeypatch.chdir(tmp_path)
    teacher = {"path": str(checkpoint(FAMILY, teacher=True))}
    return {
        "student": {"path": str(checkpoint(FAMILY))},
        "teachers": {"math": teacher, "charts": teacher},
        "teacher_column": "domain",
        "data": {"train": {"path": "data.jsonl"}},
        "training": trainer_options(Path("run"), max_steps=1, eta=0.5),
    }


def write(folder: Path, rows: list[dict]) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_routed_run(config: dict, capsys: pytest.CaptureFixture) -> None:
    assert command("check", config) == 0
    assert command("train", config) == 0
    assert Path("run/model.safetensors").exists()
    capsys.readouterr()
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    write(Path(), [*rows[:2], {**rows[2], "domain": "maps"}, {**rows[3], "domain": None}])
    sentence = refused(capsys, "train", config, "--overwrite")
    assert (
        "teacher_column 'domain' must be one of math, charts in every row, got 'maps' in row 2 of data.train"
        in sentence
    )
    assert "2 such rows: 2, 3" in sentence


def test_teachers_without_effect_are_named(config: dict, caplog: pytest.LogCaptureFixture) -> None:
    config |= {"trainer": "grpo", "training": config["training"] | {"eta": 1.0, "alpha": 0, "rewards": ["exact_match"]}}
    config["training"] |= {"num_generations": 2, "per_device_train_batch_size": 2}
    assert command("check", config) == 0
    assert "section teachers has no effect with alpha 0" in caplog.text


def test_the_resolved_config_is_the_config(config: dict) -> None:
    checked = check_config(config)
    written = resolved(checked, training_arguments(checked))
    assert check_config(yaml.safe_load(as_yaml(written)))["teachers"] == checked["teachers"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_column": None}, "need each other; got the section alone"),
        ({"teachers": None}, "needs teacher.path"),
        ({"teacher": {"path": "x"}}, "'teacher' and 'teachers' exclude each other"),
        ({"teachers": None, "teacher": {"path": "x"}}, "need each other; got teacher_column 'domain' alone"),
        ({"teachers": {}}, "must name at least one teacher"),
        ({"teachers": {"math": {"pat": "x"}}}, "Unknown key 'pat' in section 'math'; did you mean 'path'"),
        ({"teachers": {"math": {}}}, "needs teachers.math.path"),
        ({"teachers": {"math": {"path": "x", "url": "http://y"}}}, "teachers.math.path and teachers.math.url exclude"),
        ({"teachers": {"math": {"url": "http://y", "dtype": "bfloat16"}}}, "teachers.math.dtype has no effect without"),
        ({"teachers": {"math": {"path": "x", "token_file": "t"}}}, "teachers.math.token_file has no effect without"),
        ({"teachers": {"math": {"path": "x", "dtype": "b16"}}}, "teachers.math.dtype must be auto or one of torch"),
        ({"teacher_column": 3}, "teacher_column must be a text, got 3"),
        ({"objective": "visual_opsd"}, "section 'teachers' has no effect with objective 'visual_opsd'"),
    ],
)
def test_mistakes_in_a_config(config: dict, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config({name: value for name, value in {**config, **changes}.items() if value is not None})
