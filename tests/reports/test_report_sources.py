"""What a report makes of samples, phases, studies and names that a run may leave, and what it writes beside them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_image

from vgs.cli import main as cli
from vgs.errors import ConfigError
from vgs.reports.collect import collect
from vgs.reports.page import Page
from vgs.reports.png import pictures
from vgs.reports.runs import RunLog, read_runs
from vgs.reports.samples import collect_samples


def sampled(folder: Path, **changes: Any) -> RunLog:
    """A run with one answer to one question about one picture."""
    (folder / "instruments").mkdir(parents=True, exist_ok=True)
    tiny_image(0).save(folder / "instruments" / "sample.png")
    sample = {"question": "what ?", "answer": "a", "images": ["sample.png"], "tokens": ["a", "b"], "right": True}
    sample |= {"terms": {"vds": [0.5, None], "gain": [None, -2.0]}, **changes}
    log = {"loss": {1: 2.0, 2: 1.0}}
    return RunLog(folder, folder.name, series=log, samples=[{"step": 0, "samples": [sample]}])


def page_of(*runs: RunLog) -> str:
    return Page(json.loads(json.dumps(collect(runs), allow_nan=False)), "title").whole()


def test_alternatives_are_one_answer_and_values_may_be_missing(tmp_path: Path) -> None:
    runs = [sampled(tmp_path / name, answer=["5", "five"]) for name in ("a", "b")]
    found = collect_samples([[run] for run in runs])
    (question,) = found["questions"]
    assert question["answer"] == "5 or five" and [answer["arm"] for answer in question["answers"]] == [0, 1]
    assert [(term["name"], term["largest"]) for term in found["terms"]] == [("vds", 0.5), ("gain", 2.0)]
    page = page_of(*runs)
    assert "answer: 5 or five" in page and 'style="--vds:1.000" title="vds 0.500"' in page


def test_samples_are_no_markup(tmp_path: Path) -> None:
    bad = '"><script>alert(1)</script>'
    run = sampled(tmp_path / "a", terms={"vds": [0.5, 0.25], bad: [1.0, 1.0]}, question=bad, tokens=[bad, "b"])
    page = page_of(run)
    assert "alert(1)" in page and "<script>alert" not in page
    assert set(collect([run])["samples"]["questions"][0]["answers"][0]["terms"]) == {"vds"}
    with pytest.raises(ConfigError, match="whose picture must be a PNG in base64, got"):
        collect_samples([[sampled(tmp_path / "b", images=["data:image/png;base64,iVBO" + bad])]])
    kept = Page(json.loads(json.dumps(collect([run]))), "title")
    kept.numbers["samples"]["questions"][0]["images"] = [bad]
    kept.numbers[bad] = 1
    assert "<script>alert" not in kept.whole() and "<script>" not in kept.number(bad)


def test_cost_is_the_mean_over_all_steps_but_the_first(tmp_path: Path) -> None:
    steps = range(1, 10)  # four passes over each set of answers, eta in one step of eight
    series = {
        "step_time": {1: 90.0, **{n: 2.0 if n % 4 else 10.0 for n in steps if n > 1}},
        "step_time_sampling": {1: 50.0, **{n: 8.0 for n in steps if n % 4 == 0}},
        "step_time_eta": {1: 30.0, 5: 0.5},
        "step_time_optimizer": dict.fromkeys(steps, 1.0),
        "step_time_teacher": {1: 5.0},
    }
    seconds = collect([RunLog(tmp_path, "a", series=series)])["cost"]["rows"][0]["seconds"]
    assert seconds["teacher"] is None  # only while it started
    means = {name: cell["mean"] for name, cell in seconds.items() if cell}
    assert means == pytest.approx(
        {"sampling": 2.0, "eta": 0.0625, "student": 4.0 - 2.0625, "optimizer": 1.0, "step": 5.0}
    )


def test_what_steering_logs_has_names(tmp_path: Path) -> None:
    series = {"gamma_effective": {1: 2.0, 2: 0.5}, "sight": {1: 0.25, 2: 0.5}}
    curves = {curve["key"]: curve for curve in collect([RunLog(tmp_path, "a", series=series)])["curves"]}
    assert all(curve["main"] and curve["title"] != key and curve["meaning"] for key, curve in curves.items())
    assert (len(curves), curves["sight"]["unit"], curves["gamma_effective"]["unit"]) == (2, "share", "")


def steering(folder: Path) -> Path:
    """Results in the form of `vgs study steering`: two students, one arm of which was not logged."""
    students = {"weak": 0.25, "fair": 0.5}
    before = [{"student": x, "arm": "before", "rate": 0.0, "seed": 0, "validation_end": y} for x, y in students.items()]
    runs = []
    for student, start in students.items():
        for seed in (0, 1):
            cell = {"student": student, "rate": 1e-3, "seed": seed, "validation_end": start + 0.125, "right": [1, 0]}
            cell |= {"test": {"answers": start + 0.1 * seed, "digits": 0.9}, "bins": {"vds": [0.0, 1.0]}}
            curves = {"step": [1, 2, 3], "vds": [1.0, math.nan, 3.0]}
            checks = {"step": [3], "accuracy": [start + 0.125]}
            logged = {"eta": 0.5, "seconds_per_step": 2.0, "curves": curves, "validation": checks}
            runs += [{**cell, "arm": "supervised"}, {**cell, "arm": "gamma 2", **logged}]
    settings = {"steps": 3, "arms": {"gamma 2": {"gamma": 2.0}}}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"settings": settings, "before": before, "runs": runs}))
    return folder


def test_a_study_of_several_students_is_read_and_arms_without_curves_are_named(tmp_path: Path) -> None:
    assert cli.main(["report", str(steering(tmp_path / "study")), "--out", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "report.json").read_text())
    names = ["weak, supervised", "weak, gamma 2", "fair, supervised", "fair, gamma 2"]
    assert [arm["name"] for arm in numbers["arms"]] == names
    assert [arm["steps"] for arm in numbers["arms"]] == [None, 3, None, 3]
    curves = {curve["key"]: curve["series"] for curve in numbers["curves"]}
    assert [(row["arm"], row["steps"], row["mean"]) for row in curves["eval_accuracy"]] == [
        (1, [0, 3], [0.25, 0.375]),
        (3, [0, 3], [0.5, 0.625]),
    ]
    assert [(row["steps"], row["mean"]) for row in curves["vds"]] == [([1, 3], [1.0, 3.0])] * 2  # without NaN
    cells = {row["key"]: [cell and cell["mean"] for cell in row["cells"]] for row in numbers["summary"]}
    assert cells["test answers"] == pytest.approx([0.3, 0.3, 0.55, 0.55])
    assert cells["eval_accuracy"] == [0.375, 0.375, 0.625, 0.625] and cells["eta"] == [None, 0.5, None, 0.5]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Of weak, supervised · fair, supervised there are final values alone, no curves." in page


def test_what_a_study_measured_in_several_contexts_is_in_the_summary(tmp_path: Path) -> None:
    test = {"plain": {"answers": 0.5, "digits": 0.75}, "clean": {"answers": 0.875, "digits": 1.0}}
    run = {"arm": "labels", "seed": 0, "test": test, "gap": {"clean": 0.125}, "to_start": {"clean": 0.25}}
    run |= {"curves": {"step": [1], "divergence": [0.5]}, "validation": {"step": [], "accuracy": []}}
    (tmp_path / "results.json").write_text(json.dumps({"before": {"validation": 0.5}, "runs": [run]}))
    numbers = collect(read_runs([tmp_path]))
    found = {row["key"]: row["cells"][0]["mean"] for row in numbers["summary"]}
    assert (found["test plain answers"], found["gap clean"], found["to_start clean"]) == (0.5, 0.125, 0.25)


def test_a_file_in_the_way_stops_the_report_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    study, out = steering(tmp_path / "study"), tmp_path / "out"
    out.mkdir()
    (out / "figures").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(study), "--out", str(out)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and "figures', which is a file; name another folder" in said[0]
    assert [path.name for path in out.iterdir()] == ["figures"] and (out / "figures").read_text() == "mine"
    (out / "figures").unlink()
    (out / "report.html.new").write_text("mine")
    assert cli.main(["report", str(study), "--out", str(out)]) == 0
    assert (out / "report.html.new").read_text() == "mine"
    assert {path.name for path in out.iterdir()} == {"report.html.new", "report.html", "report.json", "figures"}
    assert (out / "report.html").stat().st_mode == (out / "report.html.new").stat().st_mode  # others may read it too


def test_dollars_in_names_are_no_formula(tmp_path: Path) -> None:
    log = {"loss": {1: 2.0, 2: 1.0}, "step_time": {1: 1.0}}
    name = r"cost_$\nothing_$6"  # as a formula, it cannot be parsed
    drawn = pictures(collect([RunLog(tmp_path, name, arm=name, series=log)]))
    assert set(drawn) == {"curves.png", "cost.png"}
