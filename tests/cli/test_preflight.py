"""What is found before a model is loaded: pairs that do not fit, batches without rows, lengths, room, bad rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from PIL import Image
from real_checkpoints import photos, real_checkpoint

from vgs.cli import budgets, pair
from vgs.cli import main as cli
from vgs.cli.steps import Steps, plan_steps
from vgs.errors import ConfigError

FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    real_checkpoint(FAMILY, root / "student")
    real_checkpoint(FAMILY, root / "teacher", teacher=True)
    return root


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, six questions and a config; the working directory is there."""
    for role in ("student", "teacher"):
        shutil.copytree(models / role, tmp_path / role)
    paths = photos(tmp_path / "photos", 6)
    rows = [{"question": "what is in the picture ?", "image": f"photos/{x.name}", "answer": "seven"} for x in paths]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = {
        "student": {"path": "student"},
        "teacher": {"path": "teacher", "dtype": "float32"},
        "data": {"train": {"path": "data.jsonl"}},
        "training": {"output_dir": "run", "use_cpu": True, "bf16": False, "max_completion_length": 8, "max_steps": 2}
        | {"per_device_train_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    """Change the JSON file ``path``; a dict is merged into what is there."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))


def report(capsys: pytest.CaptureFixture, *overrides: str) -> tuple[int, dict[str, dict]]:
    """Exit status and findings by stage of ``vgs check``."""
    capsys.readouterr()
    status = cli.main(["check", "run.yaml", "--json", *overrides])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"] == (status == 0)
    return status, {finding["stage"]: finding for finding in found["findings"]}


def refused(capsys: pytest.CaptureFixture, *overrides: str) -> str:
    """The sentence with which ``vgs train`` ends, before it has made anything."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "run.yaml", *overrides])
    assert stop.value.code == 2
    assert not list(Path("run").glob("*.safetensors"))
    return capsys.readouterr().err.splitlines()[-1]


def test_a_run_that_fits(folder: Path, capsys: pytest.CaptureFixture) -> None:
    status, found = report(capsys)
    assert status == 0 and found["steps"]["notes"][0].startswith("2 of 6 training rows are left out of every epoch")
    assert {stage for stage, finding in found.items() if finding["outcome"] != "ok"} == {"steps"}
    assert not Path("run").exists(), "a check leaves nothing behind"


def test_another_patch_size(folder: Path, capsys: pytest.CaptureFixture) -> None:
    edit(Path("teacher/config.json"), vision_config={"patch_size": 16})
    status, found = report(capsys)
    assert status == 2 and "patch_size 8 and 16" in found["teacher"]["notes"][0]
    assert "patch_size 8 and 16" in refused(capsys)


@pytest.mark.parametrize("thinking", ["<think>\\n", "<reason>"])
def test_a_teacher_whose_template_opens_the_reasoning(
    folder: Path, capsys: pytest.CaptureFixture, thinking: str
) -> None:
    for path in Path("teacher").glob("*chat_template*"):
        path.write_text(path.read_text() + "{% if add_generation_prompt %}{{ '" + thinking + "' }}{% endif %}")
    status, found = report(capsys)
    (note,) = found["teacher"]["notes"]
    assert status == 0 and found["teacher"]["outcome"] == "warning"
    assert note.startswith("The prompts of student and teacher end differently") and note.count("?") >= 2
    assert thinking.replace("\\n", "") in note


def test_bad_rows_are_listed_by_number(folder: Path, capsys: pytest.CaptureFixture) -> None:
    Path("photos/photo_1.jpg").write_bytes(Path("photos/photo_1.jpg").read_bytes()[:200])
    Image.new("RGB", (2048, 9)).save("photos/photo_4.jpg")
    status, found = report(capsys)
    assert status == 2 and found["rows"]["rows"] == [1, 4]
    assert "2048 x 9 pixels" in " ".join(found["rows"]["notes"])
    assert "2 of 6 rows cannot be used (row 1: " in refused(capsys)
    status, found = report(capsys, "--data.train.on_bad_row", "skip")
    assert status == 0 and found["rows"]["outcome"] == "warning" and found["rows"]["rows"] == [1, 4]


def test_too_few_rows(folder: Path, capsys: pytest.CaptureFixture) -> None:
    sentence = refused(capsys, "--per_device_train_batch_size", "8")
    assert "data.train has 6 rows, fewer than the 8 prompts of one batch" in sentence
    assert "max_steps must give at least one optimizer step, got 0" in refused(capsys, "--max_steps", "0")


def test_lengths(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert "more than the 1024 that the student was made for" in refused(capsys, "--max_completion_length", "1000")
    assert "more than max_tokens_per_pass 60" in refused(capsys, "--max_tokens_per_pass", "60")
    assert "No prompt of data.jsonl has at most max_prompt_length=5 tokens" in refused(
        capsys, "--max_prompt_length", "5"
    )


def test_what_is_not_installed(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert "use_vllm needs vLLM" in refused(capsys, "--use_vllm", "true")
    assert "report_to must be none or some of" in refused(capsys, "--report_to", "wandbb")
    assert "report_to 'clearml' needs a package" in refused(capsys, "--report_to", "clearml")


def test_misspelt_settings_of_the_processor(folder: Path, capsys: pytest.CaptureFixture) -> None:
    sentence = refused(capsys, "--processor.max_pixel", "1000")
    assert "Unknown key 'max_pixel' in section 'processor'; did you mean 'max_pixels'?" in sentence
    status, _ = report(capsys, "--processor.max_pixels", "1024")
    assert status == 0


def test_every_known_key_of_a_processor_is_taken(models: Path) -> None:
    plain = pair.load_processor({"student": {"path": str(models / "student")}})
    assert {"max_pixels", "min_pixels", "patch_size", "size", "chat_template"} <= pair.processor_keys(plain)


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({}, 1, Steps(8, 2, 4, 6)),
        ({"num_generations": 4}, 1, Steps(2, 10, 0, 30)),
        ({"gradient_accumulation_steps": 2}, 1, Steps(16, 1, 4, 3)),
        ({"max_steps": 7}, 2, Steps(16, 1, 4, 7)),
        ({"steps_per_generation": 4, "num_iterations": 2, "num_generations": 8}, 1, Steps(4, 5, 0, 120)),
        ({"num_train_epochs": 0.5}, 1, Steps(8, 2, 4, 1)),
    ],
)
def test_steps_of_twenty_rows(settings: dict, ranks: int, expected: Steps) -> None:
    defaults = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_generations": 1}
    defaults |= {"max_steps": -1, "num_train_epochs": 3}
    assert plan_steps(20, SimpleNamespace(**{**defaults, **settings}), ranks) == expected


def test_no_room_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr(budgets.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 2**30))
    args = SimpleNamespace(save_strategy="steps", save_steps=2, save_total_limit=None)
    with pytest.raises(ConfigError, match=r"10\.0 GiB free, one checkpoint takes 20\.0"):
        budgets.check_disk(tmp_path / "new" / "run", 20 * 2**30, args, None)
    budgets.check_disk(tmp_path, 2**30, args, Steps(1, 1, 0, 10))
    assert not caplog.text
    budgets.check_disk(tmp_path, 3 * 2**30, args, Steps(1, 1, 0, 10))
    assert "5 checkpoints of 3.0 GiB each will be kept" in caplog.text
