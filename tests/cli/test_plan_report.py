"""``vgs plan``: the shipped configs, what it says where a run does not fit, and machines without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from vgs.cli import main as cli
from vgs.cli import plan_report
from vgs.planning.memory import GIB, Lengths, Machine
from vgs.planning.model_size import QWEN3_VL

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with the configs of Qwen3-VL, without weights."""
    root = tmp_path_factory.mktemp("models")
    for name, config in QWEN3_VL.items():
        config().save_pretrained(root / name)
    return {path.name: str(path) for path in root.iterdir()}


@pytest.mark.parametrize("name", ["qwen3_vl_8b_to_2b", "qwen3_vl_8b_to_4b"])
def test_shipped_configs_by_command(models: dict[str, str], name: str, capsys: pytest.CaptureFixture) -> None:
    student = "4B" if name.endswith("4b") else "2B"
    paths = [f"--student.path={models[student]}", f"--teacher.path={models['8B']}"]
    command = [
        "plan",
        str(CONFIGS / f"{name}.yaml"),
        "--gpus",
        "8",
        "--sharding",
        "fsdp2",
        "--gpu-memory",
        "80",
        *paths,
    ]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Predicted memory of one GPU (of 8 GPUs, fsdp2)")
    assert next(line for line in lines if line.startswith("sum")).split()[1:] != []
    assert any(line.startswith("It fits into 80.0 GiB") for line in lines)
    assert cli.main([*command, "--json", "--response-tokens", "500"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is True
    assert result["peak_bytes"] == max(result["phases"].values())
    assert sum(sizes.get("student", 0) for sizes in result["parts"].values()) == result["phases"]["student"]


def test_sizes_alone_without_a_gpu(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(plan_report, "device_memory", lambda: None)
    path = tmp_path / "run.yaml"
    sections = {"student": {"path": models["2B"]}, "teacher": {"path": models["8B"]}}
    path.write_text(yaml.safe_dump({**sections, "data": {"train": {"path": "nowhere"}}}))
    assert cli.main(["plan", str(path), "--optim", "lomo", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert "fits" not in result
    assert result["notes"] == ["The states of optimizer 'lomo' are not known and not counted."]


def test_what_is_said_where_a_run_does_not_fit(models: dict[str, str]) -> None:
    def said(gib: int, **training: Any) -> str:
        run = {"per_device_train_batch_size": 2, "max_completion_length": 2048, **training}
        teacher = {"path": models["8B"], "dtype": "bfloat16"}
        config = {"student": {"path": models["2B"]}, "teacher": teacher, "training": run}
        return plan_report.report(config, Machine(8, memory=gib * GIB), Lengths())["text"]

    none, one, some = (
        said(20, gradient_accumulation_steps=32),
        said(80, gradient_accumulation_steps=32),
        said(45, gradient_accumulation_steps=2, gradient_checkpointing=False),
    )
    assert "does not fit into 20.0 GiB" in none and "No combination" in none
    assert "Enough on its own, cheapest first: " in one and "teacher_offload: true" in one
    assert "Enough together, cheapest first: " in some
