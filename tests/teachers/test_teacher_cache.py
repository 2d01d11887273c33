"""Hidden states on the disk: the same loss and gradients, builds that are killed, and caches that do not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from teachers import assert_same, command, loss_and_gradients, recorded_config, recorded_trainer, refused, rollout
from transformers import AutoModelForImageTextToText

from vgs.cli.cache_command import run as build
from vgs.cli.config import check_config
from vgs.errors import ConfigError
from vgs.teachers import cache as files
from vgs.teachers.cache import StateCache
from vgs.teachers.sources import TeacherSource
from vgs.trainers.off_policy import on_policy

Checkpoint = Callable[..., Path]


@pytest.fixture
def config(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.chdir(tmp_path)
    return recorded_config(checkpoint, tmp_path)


def built(config: dict, folder: Path, **options) -> Path:
    """A cache of a config's teacher, two rows a file."""
    assert build(check_config(dict(config)), folder, 2, **options) == 0
    return folder


def outcome(trainer) -> tuple:
    return loss_and_gradients(trainer, rollout(trainer))


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"max_tokens_per_pass": 400, "num_generations": 2}, marks=pytest.mark.slow)]
)
def test_the_cached_run_is_the_live_run(config: dict, tmp_path: Path, options: dict) -> None:
    config["training"] |= options
    folder = built(config, tmp_path / "cache")
    live = outcome(recorded_trainer(config))
    trainer = recorded_trainer(config, TeacherSource(cache=str(folder)))
    assert trainer.teacher_model is None, "no teacher is loaded"
    assert_same(outcome(trainer), live, rtol=1e-5, atol=1e-7)


def test_states_in_16_bits_are_the_live_ones_rounded(config: dict, tmp_path: Path) -> None:
    folder = built(config, tmp_path / "cache", stored="bfloat16")
    trainer = recorded_trainer(config)
    teacher = trainer.step_scorer.teachers[""]
    states = teacher.states
    teacher.states = lambda groups, text, then: states(
        groups, text, lambda rows: then([x.to(torch.bfloat16).to(x.dtype) for x in rows])
    )
    expected = outcome(trainer)
    found = outcome(recorded_trainer(config, TeacherSource(cache=str(folder))))
    assert_same(found, expected, rtol=1e-5, atol=1e-7)


@contextmanager
def killed_at(count: int):
    """This process is killed as its ``count``-th flush begins: of a file, or of the folder that it appeared in."""
    original, seen = os.fsync, []

    def fsync(descriptor: int) -> None:
        seen.append(descriptor)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        original(descriptor)

    files.os.fsync = fsync
    try:
        yield
    finally:
        files.os.fsync = original


#: In the head, the manifest, the first file of states; again in the first, which is missing; in the second.
MOMENTS = (1, 3, 5, 1, 3)


@pytest.mark.parametrize("moments", [MOMENTS[2:3], pytest.param(MOMENTS, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_build_that_is_killed_goes_on(config: dict, tmp_path: Path, moments: tuple[int, ...]) -> None:
    """Responses are sampled, so the bytes also show that each file draws its own random numbers."""
    config["data"]["train"].pop("responses")
    whole = built(config, tmp_path / "whole")
    folder = tmp_path / "cache"
    for count in moments:
        child = os.fork()
        if child == 0:
            with killed_at(count):
                build(check_config(dict(config)), folder, 2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        with pytest.raises(ConfigError, match=r"has no manifest.json|is not finished"):
            StateCache(folder)
    built(config, folder)
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_a_cache_that_was_made_from_something_else(config: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "cache"
    assert command("cache-teacher", config, "--out", str(folder), "--rows-per-file", "3") == 0
    assert "4 rows, 2 files" in capsys.readouterr().out
    cached = {**config, "teacher": {"cache": str(folder)}}
    both = {**config, "teacher": {**config["teacher"], "cache": str(folder)}}
    assert command("check", cached) == 0 and command("check", both) == 0

    other = tmp_path / "other"
    model = AutoModelForImageTextToText.from_pretrained(config["teacher"]["path"])
    shutil.copytree(config["teacher"]["path"], other)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save_pretrained(other)
    changed = {**both, "teacher": {"path": str(other), "cache": str(folder)}}
    assert "was made from another teacher's weights (weights was " in refused(capsys, "train", changed)
    assert "was made from another teacher's weights" in refused(
        capsys, "cache-teacher", {**config, "teacher": {"path": str(other)}}, "--out", str(folder)
    )
    smaller = {**cached, "processor": {"max_pixels": 1024}}
    assert "another processor, chat template or tokenizer" in refused(capsys, "train", smaller)
    assert "was made from other rows" in refused(capsys, "train", cached, "--data.train.limit", "3")
    assert "another mixed precision" in refused(capsys, "train", cached, "--bf16", "true")
    assert "no effect with on_policy_fraction=1" in refused(capsys, "train", both, "--on_policy_fraction", "1")
    assert "needs a path or a url" in refused(capsys, "train", cached, "--on_policy_fraction", "0.5")
    assert "has 1 responses to each prompt, fewer than num_generations=2" in refused(
        capsys, "train", cached, "--num_generations", "2"
    )

    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "has the format 99, expected 1" in refused(capsys, "train", cached)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    head = load_file(folder / "head.safetensors")
    save_file({**head, "weight": head["weight"] + 1}, folder / "head.safetensors", {"notes": '{"logit_scale": 1.0}'})
    assert "is not the head that its manifest names" in refused(capsys, "train", cached)
    path = folder / "states-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert "states-00001.safetensors' is damaged" in refused(capsys, "train", cached)
    path.unlink()
    assert "is not finished: 1 of 2 files are missing" in refused(capsys, "train", cached)


def test_a_run_reads_each_file_of_its_cache_once_before_it_starts(
    config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = built(config, tmp_path / "cache"), []
    original = StateCache._index
    monkeypatch.setattr(StateCache, "_index", lambda self, number: read.append(number) or original(self, number))
    assert command("train", {**config, "teacher": {"cache": str(folder)}}) == 0
    assert read == [0, 1]


def test_a_cache_of_data_with_a_row_that_cannot_be_used(
    config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    rows.insert(1, {**rows[0], "images": ["photos/none.png"]})
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["data"]["train"]["on_bad_row"] = "skip"
    assert command("cache-teacher", config, "--out", str(tmp_path / "cache")) == 0
    assert "4 rows" in capsys.readouterr().out
    assert command("check", {**config, "teacher": {"cache": str(tmp_path / "cache")}}) == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["seven"], "row 1: 1 responses, expected num_generations=2"),
        (None, "row 1: responses must be a text, token ids, or a list of either, got None"),
        pytest.param(
            ["seven", ""], "row 1: a response must be a text or a list of token ids, got ''", marks=pytest.mark.slow
        ),
        pytest.param(
            ["seven", "seven or nine " * 9],
            r"row 1: a response of \d+ tokens, more than max_completion_length=12",
            marks=pytest.mark.slow,
        ),
        (["seven", "<|image_pad|>"], "row 1: the image or video token"),
        ([[1, 2], [9999]], "row 1: the token id 9999, expected ids below"),
    ],
)
def test_recorded_responses_that_cannot_be_used(
    config: dict, tmp_path: Path, capsys: pytest.CaptureFixture, value: object, message: str
) -> None:
    path = tmp_path / "data.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    if isinstance(value, list) and isinstance(value[0], list):
        rows = [{**row, "responses": [[8, 9], [9, 8]]} for row in rows]
    rows[1]["responses"] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = refused(capsys, "train", config, "--num_generations", "2")
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.3, 0.5, 1.0])
def test_which_prompts_are_sampled(fraction: float) -> None:
    steps = [[on_policy(fraction, 6, step, 7, process) for process in range(2)] for step in range(20)]
    assert steps == [[on_policy(fraction, 6, step, 7, process) for process in range(2)] for step in range(20)]
    counts = [[sum(process) for process in step] for step in steps]
    assert all(one == other for one, other in counts), "every process samples as often"
    assert sum(one for one, _ in counts) == round(fraction * 6 * 20)
    if 0 < fraction < 1:
        assert any(one != other for one, other in steps)
        assert steps != [[on_policy(fraction, 6, step, 8, process) for process in range(2)] for step in range(20)]


@pytest.mark.slow
def test_a_mixed_run_resumes_exactly(config: dict, tmp_path: Path) -> None:
    """Half of the prompts have cached responses; the live teacher scores the others alone."""
    folder = built(config, tmp_path / "cache")
    teacher = TeacherSource(config["teacher"]["path"], cache=str(folder))
    options = {"on_policy_fraction": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = recorded_trainer(config, teacher, **options, output_dir=str(tmp_path / "whole"))
    asked: list[int] = []
    live = whole.step_scorer.teachers[""].live
    states = live.states
    live.states = lambda groups, *rest: asked.append(sum(len(x.responses) for x in groups)) or states(groups, *rest)
    whole.train()
    assert asked == [2] * 4, "of four responses a step"
    resumed = recorded_trainer(config, teacher, **options, output_dir=str(tmp_path / "whole"))
    torch.rand(3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, value), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.slow
def test_evaluation_without_a_live_teacher_has_an_accuracy_alone(config: dict, tmp_path: Path) -> None:
    folder = built(config, tmp_path / "cache")
    trainer = recorded_trainer(config, TeacherSource(cache=str(folder)))
    metrics = trainer.evaluate(trainer.train_dataset)
    assert 0 <= metrics["eval_accuracy"] <= 1
    assert metrics["eval_loss"] != metrics["eval_loss"]


def test_a_response_that_was_not_recorded_is_an_error(config: dict, tmp_path: Path) -> None:
    folder = built(config, tmp_path / "cache")
    trainer = recorded_trainer(config, TeacherSource(cache=str(folder)))
    trainer.model.train()
    sample = {**trainer.train_dataset[0], "responses": ["two two"]}
    with pytest.raises(ConfigError, match="has no states of a recorded response"):
        trainer.sample([sample])
