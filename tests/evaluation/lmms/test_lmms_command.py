"""``vgs eval RUN --benchmarks`` from its options to its tables, with a tiny real model and lmms-eval's own process."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import RECORDED
from real_checkpoints import real_checkpoint

from vgs.cli import eval_command
from vgs.evaluation.benchmarks import harness

SYSTEM = "look at the picture ."


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with the model that it began with beside it."""
    folder = tmp_path_factory.mktemp("runs")
    start = real_checkpoint("qwen2_5_vl", folder / "start", teacher=True)
    run = real_checkpoint("qwen2_5_vl", folder / "run")
    training = {"output_dir": str(run), "max_completion_length": 6, "temperature": 1.0, "bf16": False}
    config = {
        "student": {"path": str(start)},
        "data": {"train": {"path": "x", "system_prompt": SYSTEM}},
        "training": training,
    }
    (run / "run.json").write_text(json.dumps({"config": config, "data": {}}))
    return run


def evaluate(run: Path, *more: str) -> int:
    parser = argparse.ArgumentParser()
    eval_command.add_options(parser)
    options = [str(run), "--lmms-eval", sys.executable, "--max-tokens", "6", "--batch-size", "4", *more]
    return eval_command.run(parser.parse_args(options), [])


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_and_its_start(
    run_folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("--benchmarks", "logicvista", "--repeats", "3", "--baseline")
    assert evaluate(run_folder, *wanted) == 0
    shown = capfd.readouterr()
    out = run_folder / "eval"
    found = read(out / "results.json")
    assert list(found["model"]["benchmarks"]) == ["logicvista"]
    for who in ("model", "baseline"):
        for name, part in found[who]["benchmarks"].items():
            assert {x["questions"] for x in part.values()} == {len(RECORDED[name])}
            assert part["Acc@1"]["responses"] == 1 and part["Acc@3"]["responses"] == 3
            assert 0 <= part["Acc@3"]["accuracy"] <= 1 and 0 <= part["Acc@1"]["cut_off"] <= 1
    assert set(found["difference"]["mean"]) == {"Acc@1", "Acc@3"}
    assert found["baseline"]["settings"]["model"] == read(run_folder / "run.json")["config"]["student"]["path"]
    assert found["model"]["settings"]["system_prompt"] == SYSTEM
    assert "Difference, percentage points" in shown.out and "| LogicVista |" in (out / "results.md").read_text()
    assert "Selected Tasks" in shown.err  # what lmms-eval says passes through

    samples = [json.loads(x) for x in (out / "model/sampled-3/logicvista/samples.jsonl").read_text().splitlines()]
    responses = [sample.get("resps", sample["filtered_resps"]) for sample in samples]
    assert all(len(x) == 3 for x in responses) and len({text for x in responses for text in x}) > 1

    def never(*_: Any) -> None:
        raise AssertionError("everything has run")

    monkeypatch.setattr(harness, "run_task", never)  # a second call reads what is there
    assert evaluate(run_folder, *wanted) == 0
    assert read(out / "results.json") == found


def test_a_model_that_cannot_be_loaded_is_one_sentence(
    run_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "no such model"}')
    assert evaluate(broken, "--benchmarks", "logicvista") == 1
    last = capfd.readouterr().err.strip().splitlines()[-1]
    log = broken / "eval/model/greedy/logicvista.failed.txt"
    assert last.startswith("vgs: error: lmms-eval failed on logicvista (exit status ")
    assert "Unrecognized processing class" in last and last.endswith(f"see {log}")
    assert log.is_file() and not (log.parent / "logicvista").exists()
