"""The folder of a run: locks, what is refused, what is written down, and that nobody's files are lost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vgs.errors import ConfigError
from vgs.trainers.run_folder import LOCK, RECORD, RunFolder, differences, traces

CONFIG = {"student": {"path": "s"}, "training": {"learning_rate": 1e-5, "gamma": 2.0, "logging_steps": 1}}
DATA = {"train": "abc"}


def leave(folder: Path, *names: str) -> None:
    for name in names:
        if name.startswith("checkpoint"):
            (folder / name).mkdir()
            (folder / name / "model.safetensors").write_text("weights")
        else:
            (folder / name).write_text("{}")


def changed(**settings: object) -> dict:
    return {**CONFIG, "training": {**CONFIG["training"], **settings}}


def test_writes_down_what_the_run_is_made_from(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new" / "run").claim(CONFIG, DATA):
        record = json.loads((tmp_path / "new" / "run" / RECORD).read_text())
    assert record["config"] == CONFIG and record["data"] == DATA
    assert {"python", "torch", "transformers", "trl"} <= set(record["versions"])


def test_notes_of_other_people_are_no_run(tmp_path: Path) -> None:
    leave(tmp_path, "notes.txt")
    with RunFolder(tmp_path).claim(CONFIG):
        pass
    assert (tmp_path / "notes.txt").read_text() == "{}"


@pytest.mark.parametrize("left", ["checkpoint-3", "model.safetensors", "config.json", RECORD, "adapter_config.json"])
def test_refuses_a_used_folder_and_leaves_it_as_it_is(tmp_path: Path, left: str) -> None:
    leave(tmp_path, left, "notes.txt")
    before = traces(tmp_path)
    with (
        pytest.raises(ConfigError, match=rf"output_dir .* holds an earlier run \({left}\).*--resume.*--overwrite"),
        RunFolder(tmp_path).claim(CONFIG),
    ):
        pass
    assert traces(tmp_path) == before and (tmp_path / "notes.txt").exists()


def test_overwrite_deletes_the_earlier_run_and_nothing_else(tmp_path: Path) -> None:
    leave(tmp_path, "checkpoint-3", "model.safetensors", "notes.txt")
    with RunFolder(tmp_path).claim(CONFIG, overwrite=True):
        assert traces(tmp_path) == [RECORD]
    assert (tmp_path / "notes.txt").exists()


def test_one_run_at_a_time_even_from_another_process(tmp_path: Path) -> None:
    with RunFolder(tmp_path).claim(CONFIG):
        code = (
            "import sys; from vgs.trainers.run_folder import RunFolder\n"
            "with RunFolder(sys.argv[1]).claim({}, resume=True): pass"
        )
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert other.returncode == 1 and "is in use by another run (process" in other.stderr
    with RunFolder(tmp_path).claim(CONFIG, resume=True):  # a lock file that nobody holds is no run
        assert (tmp_path / LOCK).exists()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), RunFolder(tmp_path).claim(CONFIG):
        raise RuntimeError
    with RunFolder(tmp_path).claim(CONFIG, resume=True):
        pass


def test_a_resumed_run_must_be_the_same(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.claim(CONFIG, DATA):
        pass
    with folder.claim(changed(logging_steps=10), DATA, resume=True):  # changes no number
        pass
    with (
        pytest.raises(ConfigError, match=r"training\.gamma was 2\.0, now 1\.0.*--allow-changes"),
        folder.claim(changed(gamma=1.0), DATA, resume=True),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"data fingerprint\.train was 'abc', now 'abd'"),
        folder.claim(CONFIG, {"train": "abd"}, resume=True),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"lora was None, now \{'r': 4\}"),
        folder.claim({**CONFIG, "lora": {"r": 4}}, DATA, resume=True),
    ):
        pass
    with folder.claim(changed(gamma=1.0), DATA, resume=True, allow_changes=True):
        pass
    record = json.loads((tmp_path / RECORD).read_text())
    assert record["config"]["training"]["gamma"] == 1.0
    assert [entry["config"]["training"]["gamma"] for entry in record["history"]] == [2.0, 2.0]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="output_dir must be a folder that can be written to"),
        RunFolder(tmp_path / "file").claim(CONFIG),
    ):
        pass


def test_differences_name_every_setting() -> None:
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": 5}
    assert differences(old, new) == [("b.c", 2, 4), ("b.d", 3, None), ("e", None, 5)]


def test_a_run_that_fails_at_its_start_does_not_use_up_the_folder(tmp_path: Path) -> None:
    for left in ([], ["checkpoint-1"]):
        with pytest.raises(RuntimeError), RunFolder(tmp_path).claim(CONFIG):
            leave(tmp_path, *left)
            raise RuntimeError
        assert traces(tmp_path) == [*left, *([RECORD] if left else [])]
