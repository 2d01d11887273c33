"""A model's file that is missing or broken ends every command in one sentence that names the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from real_checkpoints import photos, real_checkpoint

from vgs.cli import main as cli

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json")
COMMANDS = ("check", "train", "eval", "plan", "init")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    real_checkpoint("qwen2_5_vl", folder / "whole")
    row = {"question": "what is it ?", "image": str(photos(folder, 1)[0]), "answer": "seven"}
    (folder / "data.jsonl").write_text(json.dumps(row))
    return folder


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for role in ("student", "teacher"):
        shutil.copytree(root / "whole", role)
    data = {"path": str(root / "data.jsonl")}
    training = {"output_dir": "run", "use_cpu": True, "bf16": False, "max_completion_length": 2}
    content = {
        "student": {"path": str(tmp_path / "student")},
        "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"train": data, "eval": data},
        "training": {**training, "per_device_train_batch_size": 1, "max_steps": 1, "eta": 1.0, "save_strategy": "no"},
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def outcome(command: str, data: Path, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Exit status and all that was said."""
    models = ["--student", str(Path("student").absolute()), "--teacher", str(Path("teacher").absolute())]
    models += ["--data", str(data / "data.jsonl"), "--out", "new.yaml"]
    arguments = ["init", *models] if command == "init" else [command, "run.yaml"]
    capsys.readouterr()
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    return status, printed.out + printed.err


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("how", ["missing", "half"])
@pytest.mark.parametrize("name", FILES)
def test_one_sentence(folder: Path, root: Path, capsys: pytest.CaptureFixture, name: str, how: str, role: str) -> None:
    path = Path(role) / name
    content = path.read_bytes()
    path.unlink()
    if how == "half":
        path.write_bytes(content[: len(content) // 2])
    failed = {}
    for command in COMMANDS:
        status, said = outcome(command, root, capsys)  # whatever it is, no exception
        assert status in (0, 2)
        if status == 2:
            failed[command] = said
            assert f"/{role}'" in said or f"{role} and" in said, f"{command}: {said}"
    if name == "config.json":
        assert set(failed) == {"check", "train", "plan", "init"} | ({"eval"} if role == "student" else set())
    if name == "model.safetensors":
        assert set(failed) == {"check", "train", "init"} | ({"eval"} if role == "student" else set())
