"""What a user can get wrong ends in one sentence and status 2, whatever the command, and never in a traceback."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tiny import save_tiny_checkpoint, tiny_image, trainer_options

from vgs.cli import main as cli
from vgs.cli.runs import load_for_eval

COMMANDS = ("train", "eval", "kl-gap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and data of many kinds of which one is good."""
    root = tmp_path_factory.mktemp("errors")
    for seed, role in enumerate(("student", "teacher")):
        save_tiny_checkpoint(root / role, seed=seed)
    tiny_image(0).save(root / "0.png")
    row = {"question": "red ?", "answer": "a", "images": "0.png", "hint": "i see red"}
    (root / "good.jsonl").write_text(json.dumps(row) + "\n")
    (root / "missing-image.jsonl").write_text(json.dumps({**row, "images": "1.png"}) + "\n")
    (root / "empty.jsonl").write_text("")
    (root / "blank.jsonl").write_text("\n\n")
    (root / "broken.jsonl").write_text('{"question": "red ?"\n')
    (root / "broken.parquet").write_bytes(b"x")
    (root / "nothing").mkdir()
    return root


@pytest.fixture
def config(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config of which every command takes some; relative data paths start at ``folder``."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # libraries' handlers hold the stderr of earlier tests
    monkeypatch.chdir(folder)
    data = {"path": "good.jsonl", "privileged_text": "hint"}
    content = {
        "objective": "visual_opsd",
        "student": {"path": "student"},
        "data": {"train": data, "eval": data},
        "training": trainer_options(
            tmp_path / "run", max_steps=1, max_completion_length=2, per_device_train_batch_size=1
        ),
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def failed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The sentence in which a command ends."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("vgs: error: ") and "Traceback" not in "".join(before)
    return last


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["{}.path", "none.jsonl"], "data path 'none.jsonl' does not exist"),
        (["{}.path", "nothing"], "; found none."),
        (["{}.path", "empty.jsonl"], "empty.jsonl has no rows"),
        (["{}.path", "blank.jsonl"], "data path 'blank.jsonl' cannot be read"),
        (["{}.path", "broken.jsonl"], "data path 'broken.jsonl' cannot be read: JSON parse error"),
        (["{}.path", "broken.parquet"], "data path 'broken.parquet' cannot be read: Parquet file size is 1 bytes"),
        (["{}.question", "problem"], "has no column 'problem'; its columns are question, answer, images, hint"),
        (["{}.limit", "0"], "limit of 'good.jsonl' must be a whole number above 0, got 0"),
        (
            ["{}.path", "missing-image.jsonl", "--max_prompt_length", "99"],
            "missing-image.jsonl: 1 of 1 rows cannot be used (row 0: cannot read",
        ),
    ],
)
def test_data_that_cannot_be_used(
    config: Path, capsys: pytest.CaptureFixture, command: str, overrides: list[str], message: str
) -> None:
    part = "--data.train" if command == "train" else "--data.eval"
    assert message in failed(capsys, command, config, overrides[0].format(part), *overrides[1:])


def test_a_model_that_cannot_be_loaded(config: Path, capsys: pytest.CaptureFixture) -> None:
    found = [
        failed(capsys, "eval", config, "--model", "nothing"),
        failed(capsys, "kl-gap", config, "--after", "nothing"),
        failed(capsys, "eval", config, "--student.path", "nothing"),
        failed(capsys, "plan", config, "--objective", "vgs", "--teacher.path", "nothing"),
        failed(capsys, "plan", config, "--student.dtype", "float99"),
        failed(capsys, "train", config, "--objective", "vgs", "--teacher.path", "nothing"),
        failed(capsys, "train", config, "--student.path", "nothing"),
        failed(capsys, "train", config, "--resume", "nowhere"),
    ]
    expected = [
        "--model 'nothing' cannot be loaded",
        "--model 'nothing' cannot be loaded",
        "student.path 'nothing' cannot be loaded",
        "The config of model 'nothing' cannot be loaded",
        "student.dtype must be auto or one of torch, such as bfloat16, got 'float99'",
        "teacher.path 'nothing' cannot be loaded",
        "student.path 'nothing' cannot be loaded",
        "--resume must be the folder of a checkpoint, got 'nowhere'",
    ]
    assert [message for sentence, message in zip(found, expected, strict=True) if message not in sentence] == []


def test_a_model_without_a_processor(config: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(folder / "student", folder / "part")
    for path in (folder / "part").glob("*processor*"):
        path.unlink()
    for command in ("eval", "train"):
        sentence = failed(capsys, command, config, "--student.path", "part")
        assert "The processor of student.path 'part' cannot be loaded: Can't load image processor" in sentence


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--data.eval.answer", "null"], "samples must have gold answers in 'answer'"),
        (["train", "--lora", "{rank: 3}"], "Unknown key 'rank' in section 'lora'; did you mean 'rank_pattern'?"),
        (["train", "--lora", "{r: 3, target_modules: [nothing]}"], "The run cannot start: Target modules"),
        (["plan", "--lora", "{r: three}"], "lora.r must be a whole number, got 'three'"),
        (["train", "--learning_rate", "[1"], "--learning_rate is not YAML"),
        (["train", "--training.data", "{eval: {}}"], "Unknown key 'data' in section 'training'"),
        (["eval", "--out", "nothing"], "--out must be a file, got the folder 'nothing'"),
        (["kl-gap", "--out", "good.jsonl/x.json"], "--out 'good.jsonl' cannot be written"),
    ],
)
def test_settings_that_do_not_fit(
    config: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert message in failed(capsys, arguments[0], config, *arguments[1:])


def test_data_that_a_config_lacks(config: Path, capsys: pytest.CaptureFixture) -> None:
    content = yaml.safe_load(config.read_text())
    del content["data"]["eval"]
    config.write_text(yaml.safe_dump(content))
    for command in ("eval", "kl-gap"):
        assert "The config has no data.eval to evaluate on" in failed(capsys, command, config)
    del content["data"]["train"]["path"]
    config.write_text(yaml.safe_dump(content))
    assert "needs data.train.path" in failed(capsys, "train", config)


@pytest.mark.parametrize("command", [*COMMANDS, "plan"])
def test_a_file_that_is_no_config(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, command: str) -> None:
    assert "cannot be read: [Errno 2]" in failed(capsys, command, tmp_path / "none.yaml")
    of_folder = "expected a config, got the folder" if command == "eval" else "cannot be read: [Errno 21]"
    assert of_folder in failed(capsys, command, tmp_path)
    assert "cannot be read: 'utf-8' codec" in failed(capsys, command, folder / "0.png")
    for text, message in (("training: [1, 2", "is not YAML: "), ("[1, 2]", "must hold sections of keys, got list")):
        (tmp_path / "x.yaml").write_text(text)
        assert message in failed(capsys, command, tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "run.yaml", "--batch-size", "0"], "--batch-size: expected a whole number above 0, got '0'"),
        (["eval", "run.yaml", "--temperature", "inf"], "--temperature: expected a number above 0, got 'inf'"),
        (["eval", "run.yaml", "--seed", "-1"], "--seed: expected a whole number, got '-1'"),
        (["kl-gap", "run.yaml", "--samples", "-1"], "--samples: expected a whole number above 0, got '-1'"),
        (["plan", "run.yaml", "--gpus", "two"], "--gpus: expected a whole number above 0, got 'two'"),
        (["plan", "run.yaml", "--gpu-memory", "-3"], "--gpu-memory: expected a number above 0, got '-3'"),
        (["demo", "--gamma", "1"], "unrecognized arguments: --gamma 1"),
    ],
)
def test_options_of_the_wrong_kind(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_a_demo_that_cannot_write(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for command in (["demo"], ["study", "grpo"]):
        assert "cannot be written" in failed(capsys, *command, "--out", folder / "good.jsonl")


def test_what_is_logged(
    config: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One handler while a command runs; a traceback where it is asked for."""
    shutil.copy(folder / "good.jsonl", folder / "number.jsonl")
    with (folder / "number.jsonl").open("w") as file:
        file.write(json.dumps({"question": "red ?", "answer": 3, "images": "0.png", "hint": "x"}) + "\n")
    arguments = ["eval", str(config), "--data.eval.path", "number.jsonl"]
    assert cli.main(arguments) == 0
    message = "vgs.data.sources: WARNING: number.jsonl: answer in 1 of 1 rows is a number"
    assert sum(line.startswith(message) for line in capsys.readouterr().err.splitlines()) == 1
    assert logging.getLogger("vgs").handlers == []
    for level, shown in (("error", False), ("debug", True)):
        monkeypatch.setenv("VGS_LOG", level)
        with pytest.raises(SystemExit):
            cli.main(["eval", str(tmp_path / "none.yaml")])
        assert ("Traceback" in capsys.readouterr().err) == shown
    monkeypatch.setenv("VGS_LOG", "loud")
    assert "VGS_LOG must be one of debug, info, warning, error, got 'loud'" in failed(capsys, *arguments)


def test_a_model_is_measured_in_the_type_of_the_run(config: Path, folder: Path, tmp_path: Path) -> None:
    """Not in that of its checkpoint, which training changes."""
    half = transformers.AutoModelForImageTextToText.from_pretrained(folder / "student", dtype="bfloat16")
    half.save_pretrained(tmp_path / "half")
    loaded = load_for_eval(cli.load_config(config), str(tmp_path / "half"))
    assert loaded.model.dtype == torch.float32
    loaded = load_for_eval(cli.load_config(config, ["--student.dtype", "bfloat16"]), str(folder / "student"))
    assert loaded.model.dtype == torch.bfloat16
