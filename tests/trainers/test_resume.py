"""A run that is killed and resumed ends bit for bit where the uninterrupted run ends (on the CPU)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import SUPPORT
from resume_worker import build, differences, everything

from vgs.trainers.checkpoints import MANIFEST, find_damage, newest_complete_checkpoint


def killed_runs(folder: Path, processes: int, kills: int, *saving: str) -> list[str]:
    """Runs the worker and compares all ranks' results; returns what was killed when."""
    seed = random.randrange(2**31)
    print("seed", seed)
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(map(str, (root, SUPPORT))),
    }
    command = [sys.executable, str(SUPPORT / "resume_worker.py"), str(folder)]
    result = subprocess.run(
        [*command, *map(str, (seed, processes, kills)), *saving],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    events = json.loads((folder / "events.json").read_text())
    print("\n".join(events))
    for rank in range(processes):
        whole = torch.load(folder / f"whole-{rank}.pt", weights_only=False)
        finished = sorted(folder.glob(f"killed*-{rank}.pt"))
        assert finished
        for path in finished:
            assert differences(torch.load(path, weights_only=False), whole) == [], (path.name, events)
    return events


@pytest.mark.parametrize("kills", [0, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_that_is_killed_ends_where_the_whole_run_ends(tmp_path: Path, kills: int) -> None:
    """Once while a checkpoint is written, once before it is renamed, and at random moments."""
    events = killed_runs(tmp_path, 1, kills, "write", "rename")
    assert [event.partition(":")[0] for event in events] == ["saving"] * 2 + ["random"] * kills
    left = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    # A kill between the appearance of a checkpoint and the rotation may leave one more.
    assert {"checkpoint-10", "checkpoint-12"} <= left <= {"checkpoint-8", "checkpoint-10", "checkpoint-12"}
    assert [find_damage(tmp_path / "run" / name) for name in left] == [None] * len(left)


@pytest.mark.slow
def test_each_of_two_ranks_continues_its_own_sampling(tmp_path: Path) -> None:
    killed_runs(tmp_path, 2, 1, "rename")
    ranks = [torch.load(tmp_path / f"whole-{rank}.pt", weights_only=False) for rank in range(2)]
    assert not torch.equal(ranks[0]["rng"][0], ranks[1]["rng"][0])
    assert differences(ranks[1]["weights"], ranks[0]["weights"]) == []


class Killed(Exception):
    pass


def resumed(folder: Path, checkpoint: str | bool, **options) -> dict[str, Any]:
    trainer = build(folder, **options)
    torch.rand(3)  # whatever a new process draws before it resumes
    trainer.train(resume_from_checkpoint=checkpoint)
    return everything(trainer)


def test_every_checkpoint_leads_to_the_same_end(tmp_path: Path) -> None:
    """Within an epoch and between two, with metrics still to be logged, and after the last step."""
    options = {"save_steps": 1, "max_steps": 8, "save_total_limit": None}
    whole = build(tmp_path, **options)
    whole.train()
    expected = everything(whole)
    assert [entry["step"] for entry in expected["logs"]] == [4, 5, 8, 8]
    assert len(expected["steering"]["attributes"]["recent"]) == 3, "it has seen more than its first steps"
    for step in (2, 6, 7, 8):
        assert differences(resumed(tmp_path, str(tmp_path / f"checkpoint-{step}"), **options), expected) == []


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.slow
def test_an_epoch_that_ends_with_a_checkpoint_is_still_evaluated(tmp_path: Path, evaluation: int) -> None:
    """Killed in the evaluation after the last step of an epoch, of the first one or of the whole run."""
    options = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 3, "max_steps": 6}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    killed = build(tmp_path / "killed", **options)
    evaluate, calls = killed.evaluate, []

    def evaluate_or_die(*args: Any, **kwargs: Any) -> dict[str, float]:
        calls.append(killed.state.global_step)
        if len(calls) == evaluation:
            raise Killed
        return evaluate(*args, **kwargs)

    killed.evaluate = evaluate_or_die
    with pytest.raises(Killed):
        killed.train()
    assert newest_complete_checkpoint(tmp_path / "killed") == tmp_path / "killed" / f"checkpoint-{calls[-1]}"
    assert differences(resumed(tmp_path / "killed", True, **options), everything(whole)) == []


def test_the_first_evaluation_is_not_repeated(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_steps": 1, "eval_on_start": True}
    whole = build(tmp_path, **options)
    whole.train()
    expected = everything(whole)
    assert [entry["step"] for entry in expected["logs"] if "eval_loss" in entry] == [0, 2]
    assert differences(resumed(tmp_path, str(tmp_path / "checkpoint-1"), **options), expected) == []


def test_eta_is_not_measured_again_when_callbacks_are_restored_by_the_host(tmp_path: Path) -> None:
    options = {"max_steps": 4, "restore_callback_states_from_checkpoint": True}
    whole = build(tmp_path, **options)
    whole.train()
    expected = everything(whole)
    assert len(whole.steering.ratios) == 3
    assert differences(resumed(tmp_path, str(tmp_path / "checkpoint-2"), **options), expected) == []


def test_another_number_of_processes_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_steps": 2, "save_steps": 1}
    build(tmp_path, **options).train()
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "progress_0.pt").unlink()
    (checkpoint / MANIFEST).unlink()
    assert resumed(tmp_path, str(checkpoint), **options)["counts"][0] == 2
    assert "whether it is complete is unknown" in caplog.text
    assert "1 process(es): training continues, but not exactly" in caplog.text
