"""The session on a GPU: its stages, what it does when one fails or takes too long, and the table at its end."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import session
from benchmarks.results import Results
from benchmarks.session import Stage, run, stages, table

PREDICTED = {
    "shape": "8b-2b",
    "tokens": 8192,
    "dtype": "bfloat16",
    "devices": {name: {"vgs": {"ours": {"seconds": x}}} for name, x in (("H100", 0.09), ("H200", 0.08))},
}


@pytest.fixture
def losses(tmp_path):
    results = Results(tmp_path / "losses.json", {"device_name": "NVIDIA H100 80GB HBM3"})
    common = {"shape": "8b-2b", "dtype": "bfloat16", "job": "vgs", "status": "ok"}
    for method, seconds in (("floor", 0.07), ("ours", 0.1), ("trl", 0.2), ("eager", 0.15)):
        results.add({**common, "tokens": 8192, "method": method, "seconds": [seconds]})
    results.add({**common, "tokens": 1024, "method": "ours", "seconds": [5.0]})
    return results.path


def test_measured_beside_predicted(losses):
    text = table(losses, PREDICTED)
    assert "NVIDIA H100" in text and "predicted for an H100" in text
    assert text.splitlines()[-1] == "| vgs | 100.0 | 90.0 | 1.11 | 0.70 | 150.0 (eager) |"


def test_methods_that_failed_are_named(losses):
    results = Results.load(losses)
    results.add({**results.rows[0], "method": "eager", "status": "out of memory", "seconds": []})
    assert session.failed_rows(losses) == ["vgs, eager: out of memory"]
    assert session.failed_rows(losses.with_name("none.json")) == []


def test_the_committed_predictions_can_be_read(losses):
    predicted = json.loads(session.PREDICTED.read_text())
    assert set(predicted["devices"]) == {"H100", "H200"} and "| vgs | 100.0 |" in table(losses, predicted)


@pytest.mark.parametrize("rehearse", [False, True])
def test_stages_fit_into_the_time_and_write_into_the_folder(tmp_path, rehearse):
    found = stages(tmp_path, "abc", 12.0, rehearse)
    assert [stage.name for stage in found] == ["exactness", "losses", "steps"]
    assert sum(stage.share for stage in found) <= 0.96
    for stage in found[1:]:
        minutes = float(stage.command[stage.command.index("--minutes") + 1])
        assert 0 < minutes < 12 * stage.share and str(tmp_path) in " ".join(stage.command) and "abc" in stage.command
        assert any("emulation" in x for x in stage.command) is rehearse


def test_a_stage_that_fails_hangs_or_lacks_a_package(tmp_path):
    def status(code: str, seconds: float = 30.0, needs: tuple[str, ...] = ()) -> str:
        return run(Stage("x", ("-c", code), 1.0, needs), tmp_path, seconds)["status"]

    assert status("print('written')") == "ok" and (tmp_path / "x.log").read_text() == "written\n"
    assert status("raise SystemExit(3)") == "failed with exit status 3"
    assert status("import time; print('begun', flush=True); time.sleep(60)", 3.0) == "stopped after 3 s"
    assert (tmp_path / "x.log").read_text() == "begun\n"
    assert status("", needs=("golf_course",)) == "left out: golf_course missing"


def test_a_session_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    """Each stage's end is on disk before the next begins; the table says why there is none."""

    def made(out, commit, minutes, rehearse):
        return [Stage("one", ("-c", "raise SystemExit(1)"), 0.3, ()), Stage("two", ("-c", ""), 0.3, ())]

    monkeypatch.setattr(session, "stages", made)
    monkeypatch.setattr(sys, "argv", ["session", "--out", str(tmp_path / "out"), "--minutes", "2"])
    assert session.main() == 1
    saved = json.loads((tmp_path / "out/session.json").read_text())
    assert [stage["status"] for stage in saved["stages"]] == ["failed with exit status 1", "ok"]
    assert (tmp_path / "out/table.md").read_text().startswith("No table:")
    assert "two: ok" in capsys.readouterr().out
