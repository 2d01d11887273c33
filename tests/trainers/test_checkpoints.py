"""Checkpoints that appear whole or not at all, and what happens to damaged ones."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from resume_worker import build

from vgs.cli import main as cli
from vgs.trainers import checkpoints
from vgs.trainers.checkpoints import (
    MANIFEST,
    STAGING,
    TRASH,
    check_writable,
    clear_leftovers,
    discard,
    find_damage,
    newest_complete_checkpoint,
    write_manifest,
)


def make_checkpoint(folder: Path, content: str = "weights") -> Path:
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "0.bin").write_text(content)
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder)
    return folder


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


# ---- the output folder


def test_a_missing_output_folder_is_created_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "vgs")
    assert list((tmp_path / "runs" / "vgs").iterdir()) == []


def test_an_output_folder_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"output_dir must be a folder .*, got '.*file/run' \(Not a directory"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_an_output_folder_that_takes_no_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(ValueError, match=f"output_dir must be .*{os.strerror(code)}"):
        check_writable(tmp_path)


def test_train_looks_at_the_output_folder_before_it_loads_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    training = {"output_dir": str(tmp_path / "file" / "run"), "use_cpu": True, "bf16": False, "report_to": "none"}
    missing = {"path": str(tmp_path / "no such model")}
    with pytest.raises(ValueError, match="output_dir must be a folder that can be written to"):
        cli.train({"student": missing, "teacher": missing, "data": {"train": missing}, "training": training})


# ---- manifests


def truncate(folder: Path) -> None:
    (folder / "shards" / "0.bin").write_text("weigh")


def flip(folder: Path) -> None:
    (folder / "shards" / "0.bin").write_text("weighs!")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: (folder / "shards" / "0.bin").unlink(), "shards/0.bin is missing"),
    "size": (truncate, "shards/0.bin has 5 bytes instead of 7"),
    "checksum": (flip, r"the checksum of shards/0.bin is \d+ instead of \d+"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"shards'), "its manifest.json cannot be read"),
    "another's manifest": (lambda folder: (folder / MANIFEST).write_text('{"a": "b"}'), "its manifest.json cannot be"),
    "a list": (lambda folder: (folder / MANIFEST).write_text("[1]"), "its manifest.json cannot be read"),
    "binary": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe\x00"), "its manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_one_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    good = make_checkpoint(tmp_path / "checkpoint-9")
    broken = make_checkpoint(tmp_path / "checkpoint-10")
    assert newest_complete_checkpoint(tmp_path) == broken
    assert caplog.messages == []
    change, reason = DAMAGES[damage]
    change(broken)
    assert newest_complete_checkpoint(tmp_path) == good
    (message,) = caplog.messages
    assert re.search(f"^The checkpoint .*checkpoint-10 is skipped: {reason}", message)


def test_the_newest_is_the_one_that_was_saved_last(tmp_path: Path) -> None:
    """Of a run that went on from step 40, not of the one that had reached step 100 before."""
    make_checkpoint(tmp_path / "checkpoint-40")
    make_checkpoint(tmp_path / "checkpoint-100")
    again = make_checkpoint(tmp_path / "checkpoint-60")
    os.utime(tmp_path / "checkpoint-100" / MANIFEST)  # copied since
    assert newest_complete_checkpoint(tmp_path) == again


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1")

    def fail(path: Path) -> int:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoints, "_checksum", fail)
    assert find_damage(folder) == "0.bin cannot be read (Input/output error)"


def test_a_deletion_that_leaves_something_behind_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / TRASH / "checkpoint-1")
    make_checkpoint(tmp_path / "checkpoint-1")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    discard(tmp_path / "checkpoint-1")
    assert folders(tmp_path) == [TRASH]


def test_a_failed_rename_puts_the_old_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = make_checkpoint(tmp_path / "checkpoint-1", "old")
    staged = make_checkpoint(tmp_path / STAGING / "checkpoint-1", "new")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source) == staged:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.appear(staged, final)
    assert (final / "shards" / "0.bin").read_text() == "old"
    assert find_damage(final) is None


def test_only_checkpoints_are_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("checkpoint-x", "checkpoint-7-old", "xcheckpoint-8", f"{STAGING}/checkpoint-9"):
        make_checkpoint(tmp_path / name)
    (tmp_path / "checkpoint-10").touch()
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "nothing") is None
    assert caplog.messages == []


def test_a_file_that_is_added_later_does_no_damage(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint-1")
    (folder / "notes.txt").touch()
    assert find_damage(folder) is None


# ---- left-overs


def test_leftovers_are_removed_and_a_whole_one_gets_its_name(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-1")
    make_checkpoint(tmp_path / STAGING / "checkpoint-2")
    (tmp_path / STAGING / "checkpoint-3").mkdir()
    (tmp_path / STAGING / "checkpoint-3" / "model.safetensors").touch()
    make_checkpoint(tmp_path / TRASH / "checkpoint-0")
    clear_leftovers(tmp_path)
    assert folders(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    clear_leftovers(tmp_path / "nothing")


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    old = make_checkpoint(tmp_path / "checkpoint-2", "old")
    make_checkpoint(tmp_path / STAGING / "checkpoint-2", "new")
    discard(old)
    clear_leftovers(tmp_path)
    assert (tmp_path / "checkpoint-2" / "shards" / "0.bin").read_text() == "new"
    assert folders(tmp_path) == ["checkpoint-2"]


def test_a_checkpoint_is_renamed_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "checkpoint-2")
    make_checkpoint(tmp_path / TRASH / "checkpoint-2")  # a deletion that was killed
    seen = []

    def look(path: Path, **options: object) -> None:
        seen.append((Path(path).name, folders(tmp_path)))
        remove(path, **options)

    remove = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", look)
    discard(tmp_path / "checkpoint-2")
    assert seen == [(TRASH, [TRASH, "checkpoint-2"]), (TRASH, [TRASH])]
    assert folders(tmp_path) == []


# ---- the trainer


def test_checkpoints_rotate_after_the_new_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look(folder: Path) -> None:
        seen.append((folder.name, newest_complete_checkpoint(tmp_path).name))
        discard(folder)

    monkeypatch.setattr(checkpoints, "discard", look)
    trainer = build(tmp_path, max_steps=3, save_steps=1, save_total_limit=1, eval_strategy="no")
    trainer.train()
    assert seen == [("checkpoint-1", "checkpoint-2"), ("checkpoint-2", "checkpoint-3")]
    assert folders(tmp_path) == ["checkpoint-3"]
    assert set(json.loads((tmp_path / "checkpoint-3" / MANIFEST).read_text())["files"]) == {
        str(path.relative_to(tmp_path / "checkpoint-3"))
        for path in (tmp_path / "checkpoint-3").rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def test_the_best_checkpoint_survives_a_folder_in_any_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"save_steps": 1, "eval_steps": 1, "eval_strategy": "steps", "save_total_limit": 1, "eval_greedy": True}
    trainer = build(Path("runs"), max_steps=3, load_best_model_at_end=True, **options)
    trainer.args.output_dir = "./runs//x"
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == f"checkpoint-{trainer.state.best_global_step}"
    assert find_damage(tmp_path / best) is None


def test_a_checkpoint_of_the_same_step_makes_way_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(tmp_path, max_steps=1, save_steps=1, eval_strategy="no")
    trainer.train()
    old = (tmp_path / "checkpoint-1").stat().st_ino
    moves = []

    def look(source: Path, target: Path) -> None:
        assert old in [path.stat().st_ino for path in tmp_path.rglob("checkpoint-1")], "not deleted yet"
        moves.append([find_damage(tmp_path / name / "checkpoint-1") for name in (STAGING, "", TRASH)])
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", look)
    trainer._save_checkpoint(trainer.model, None)
    absent = "it has no manifest.json"
    assert moves == [[None, None, absent], [None, absent, None]], "the new one is complete before the old one moves"
    assert find_damage(tmp_path / "checkpoint-1") is None
    assert (tmp_path / "checkpoint-1").stat().st_ino != old
    assert folders(tmp_path) == ["checkpoint-1"]


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(tmp_path, max_steps=4, save_steps=1, eval_steps=1, save_total_limit=2, load_best_model_at_end=True)
    losses = iter([3.0, 1.0, 2.0, 2.0])
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda **options: {**evaluate(**options), "eval_loss": next(losses)})
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert trainer.state.best_model_checkpoint == str(best)
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    for name in folders(tmp_path):
        assert json.loads((tmp_path / name / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    expected = build(tmp_path / "other")
    expected._load_from_checkpoint(str(best))
    weights = trainer.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in expected.model.state_dict().items())


@pytest.mark.parametrize("where", ["optimizer.pt", "progress_0.pt", MANIFEST])
def test_a_full_disk_leaves_the_earlier_checkpoints_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    trainer = build(tmp_path, max_steps=3, save_steps=1, save_total_limit=1, eval_strategy="no")
    save, write_text = torch.save, Path.write_text

    def fails(path: str | Path) -> None:
        if Path(path).name == where and trainer.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_save(value: object, path: str | Path) -> None:
        fails(path)
        save(value, path)

    def full_write(path: Path, text: str, **options: object) -> int:
        fails(path)
        return write_text(path, text, **options)

    monkeypatch.setattr(torch, "save", full_save)
    monkeypatch.setattr(Path, "write_text", full_write)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert folders(tmp_path) == ["checkpoint-1"]
    assert find_damage(tmp_path / "checkpoint-1") is None
    assert f"{tmp_path / 'checkpoint-2'} could not be saved; earlier checkpoints are as they were." in caplog.messages


def test_what_resume_from_checkpoint_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"max_steps": 3, "save_steps": 1, "save_total_limit": None, "eval_strategy": "no"}
    build(tmp_path, **options).train(resume_from_checkpoint=True)
    assert f"{tmp_path} has no complete checkpoint: training starts from the beginning." in caplog.messages
    for step, name in ((2, "optimizer.pt"), (3, "model.safetensors")):
        path = tmp_path / f"checkpoint-{step}" / name
        path.write_bytes(path.read_bytes()[:-1])

    trainer = build(tmp_path, **options)
    wrong = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"must be a complete checkpoint, but in .*-3' model.safetensors has"):
        trainer.train(resume_from_checkpoint=wrong)
    with pytest.raises(ValueError, match=r"must be the folder of a checkpoint, got '.*checkpoint-4'"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    caplog.clear()
    (tmp_path / STAGING).mkdir()
    trainer.train(resume_from_checkpoint=True)
    skipped = [message for message in caplog.messages if "is skipped" in message]
    assert [message.partition(" is ")[0][-1] for message in skipped] == ["3", "2"]
    assert [entry["step"] for entry in trainer.state.log_history][-1] == 3
    assert trainer.state.global_step == 3
    assert folders(tmp_path) == [f"checkpoint-{step}" for step in (1, 2, 3)]
    assert [find_damage(tmp_path / name) for name in folders(tmp_path)] == [None] * 3, "saved anew"
