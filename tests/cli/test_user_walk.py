"""As a new user: two models on disk, photos as phones store them and questions in JSONL, all by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from real_checkpoints import photos, real_checkpoint

from vgs.cli import main as cli

ROOT = Path(__file__).parents[2]
FAMILIES = ("internvl", "qwen2_5_vl")
SIDEWAYS = {0x0112: 6}  # EXIF: the camera was turned
# A user's own comparison of answers; in the run that is stopped, it waits in the second step until that has happened.
JUDGE = """
import os, time

calls = 0

def judge(response, gold):
    global calls
    calls += 1
    if os.environ.get("WAIT") and calls == 3:
        open("reached", "w").close()
        while not os.path.exists("sent"):
            time.sleep(0.01)
    return gold in response
"""
OPTIONS = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--max_completion_length", "5"]
OPTIONS += ["--learning_rate", "1e-2", "--eval_strategy", "no", "--save_strategy", "no", "--scorer", "judge:judge"]


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has; the working directory is there."""
    real_checkpoint(request.param, tmp_path / "student")
    real_checkpoint(request.param, tmp_path / "teacher", teacher=True)
    rows = []
    for number, path in enumerate(photos(tmp_path / "photos", 10)):
        image = Image.open(path)
        exif = image.getexif()
        exif.update(SIDEWAYS if number % 2 else {})
        image.save(path, exif=exif)
        question = ("what is in the picture ?", "seven or nine ?")[number % 2]
        rows.append({"question": question, "image": f"photos/{path.name}", "answer": "seven"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "judge.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "judge", raising=False)
    return tmp_path


def stopped(*arguments: str) -> int:
    """The exit status of a command that is stopped by SIGTERM in its second step."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "WAIT": "1", "PYTHONPATH": paths}
    process = subprocess.Popen([sys.executable, "-m", "vgs.cli", *arguments], env=environment)
    while not Path("reached").exists():
        assert process.poll() is None, "the run ended before its second step"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    Path("sent").touch()
    return process.wait(timeout=120)


@pytest.mark.slow
def test_from_init_to_eval(folder: Path, capsys: pytest.CaptureFixture) -> None:
    models = ["--student", "student", "--teacher", "teacher"]
    assert cli.main(["init", *models, "--data", "questions.jsonl", "--out", "my.yaml"]) == 0
    assert cli.main(["check", "my.yaml"]) == 0
    report = capsys.readouterr().out
    assert "9 rows of questions.jsonl" in report and "error" not in report.replace("0 errors", "")

    assert cli.main(["train", "my.yaml", *OPTIONS, "--output_dir", "whole"]) == 0
    assert stopped("train", "my.yaml", *OPTIONS, "--output_dir", "run") == 128 + signal.SIGTERM
    assert [path.name for path in Path("run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not Path("run/model.safetensors").exists()
    assert cli.main(["train", "my.yaml", *OPTIONS, "--output_dir", "run", "--resume"]) == 0
    assert Path("run/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    record = json.loads(Path("run/run.json").read_text())
    assert record["config"]["training"]["gamma"] == 2.0 and set(record["data"]) == {"train", "eval"}

    capsys.readouterr()
    assert cli.main(["eval", "my.yaml", "--model", "run", "--max_completion_length", "5"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["samples"] == 1


def test_a_used_folder_is_refused_before_a_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vgs.cli import pair

    content = {
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"train": {"path": "questions.jsonl"}},
        "training": {"output_dir": "run", "use_cpu": True, "bf16": False},
    }
    Path("my.yaml").write_text(yaml.safe_dump(content))
    Path("run/checkpoint-7").mkdir(parents=True)
    monkeypatch.setattr(pair, "load_processor", lambda *_, **__: pytest.fail("a processor was loaded"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "my.yaml"])
    assert stop.value.code == 2
    assert "output_dir 'run' holds an earlier run (checkpoint-7)" in capsys.readouterr().err
    assert Path("run/checkpoint-7").is_dir()
