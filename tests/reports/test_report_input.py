"""What a report is made from: folders that are no runs, arms, intervals, numbers as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vgs.cli import main as cli
from vgs.cli.geometry_command import step_of
from vgs.reports.collect import collect
from vgs.reports.quantities import shown
from vgs.reports.runs import read_runs
from vgs.reports.statistics import interval, t_quantile

ROOT = Path(__file__).parents[2]
HISTORY = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]


def training(folder: Path, record: Any = None, state: Any = None) -> Path:
    """The folder of a run, as far as a report looks at it."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"config": {"training": {"seed": 0}}, **(record or {})}))
    if state is None:
        state = {"global_step": 2, "log_history": HISTORY}
    (folder / "trainer_state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    return folder


def study(folder: Path, results: Any) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def of_another_form(folder: Path) -> Path:
    path = training(folder) / "instruments" / "geometry-000002.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"kind": "geometry", "form": 99}))
    return folder


def without_log(folder: Path) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder, "which is no folder"),
        (empty, "which has neither run.json and trainer_state.json"),
        (without_log, "has no log: expected trainer_state.json in it or in a checkpoint"),
        (lambda folder: training(folder, state="{"), "trainer_state.json must hold JSON, but cannot be read"),
        (lambda folder: training(folder, state=[]), "must have a trainer's state as a JSON object, got list"),
        (lambda folder: training(folder, state={"global_step": 1}), "must have a list log_history with entries"),
        (lambda folder: study(folder, {"kind": "speed"}), "must have runs with an arm and curves or a test"),
        (of_another_form, "must be of kind 'geometry' in form 1, got kind 'geometry' in form 99"),
    ],
)
def test_what_is_no_run_ends_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture, make: Any, message: str
) -> None:
    folder = make(tmp_path / "x")
    with pytest.raises(SystemExit) as stop:
        cli.main(["report", str(folder), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = training(tmp_path / "x")
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder), f"{folder}/../x", "--out", str(tmp_path / "out")])
    assert "is given twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("{tmp}/alone", [], "is in no run (no run.json): name its data and teacher by --config"),
        ("{tmp}/broken", [], "broken/run.json cannot be read"),
        ("{tmp}/none.yaml", [], "none.yaml' cannot be read"),
        ("configs/digits_visual_opsd.yaml", [], "geometry needs a separate teacher, which self-distillation has not"),
        (
            "configs/digits_grpo.yaml",
            ["--alpha", "0"],
            "geometry needs a separate teacher, which GRPO alone (training.alpha: 0) has not",
        ),
        ("configs/digits.yaml", ["--lora.r", "4"], "geometry looks at whole weights: leave section lora out"),
        ("configs/digits.yaml", ["--gama", "4"], "Unknown key 'gama'"),
    ],
)
def test_geometry_of_what_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture, checkpoint: str, options: list[str], message: str
) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{}")
    given = checkpoint.format(tmp=tmp_path) if "{" in checkpoint else str(ROOT / checkpoint)
    with pytest.raises(SystemExit) as stop:
        cli.main(["geometry", given, "--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("state", ["[3]", "{", '{"global_step": null}', "{}"])
def test_a_step_that_nothing_tells_is_0(tmp_path: Path, state: str) -> None:
    (tmp_path / "trainer_state.json").write_text(state)
    assert step_of(str(tmp_path)) == 0


def test_geometry_replaces_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "geometry-000000.json").write_text('{"kind": "mine"}')
    with pytest.raises(SystemExit):
        cli.main(["geometry", str(ROOT / "configs/digits.yaml"), "--out", str(tmp_path)])
    assert "which this command has not written" in capsys.readouterr().err
    assert (tmp_path / "geometry-000000.json").read_text() == '{"kind": "mine"}'


def test_runs_that_differ_in_their_seed_are_one_arm(tmp_path: Path) -> None:
    def config(seed: int, gamma: float, **more: Any) -> dict[str, Any]:
        own = {"seed": seed, "gamma": gamma, "output_dir": f"runs/{seed}", "save_steps": seed, **more}
        return {"config": {"training": own, "digits": {"data_seed": seed}}}

    folders = [training(tmp_path / f"run{n}", config(n, gamma)) for n, gamma in enumerate((0.0, 2.0, 0.0, 2.0))]
    numbers = collect(read_runs(folders))
    assert [[run["name"] for run in arm["runs"]] for arm in numbers["arms"]] == [["run0", "run2"], ["run1", "run3"]]
    assert [arm["name"] for arm in numbers["arms"]] == ["gamma 0.0", "gamma 2.0"]  # the folders do not tell them apart
    assert numbers["differences"] == [{"setting": "training.gamma", "values": [0.0, 2.0]}]
    (curve,) = numbers["curves"]
    assert curve["series"][0]["mean"] == [2.0, 1.0] and curve["series"][0]["low"] == [2.0, 1.0]


def test_long_logs_are_averaged_and_nothing_is_lost(tmp_path: Path) -> None:
    history = [{"step": n, "loss": float(n)} for n in range(1, 1001)]
    numbers = collect(read_runs([training(tmp_path / "long", state={"global_step": 1000, "log_history": history})]))
    series = numbers["curves"][0]["series"][0]
    assert series["averaged"] == 21 and len(series["steps"]) == 48 and series["steps"][-1] == 1000
    assert series["mean"][0] == 11.0 and series["mean"][-1] == 994.0  # 1 to 21, 988 to 1000


def test_runs_of_different_length_are_compared_where_both_have_been(tmp_path: Path) -> None:
    longer = {"global_step": 3, "log_history": [*HISTORY, {"step": 3, "loss": 0.5}]}
    numbers = collect(read_runs([training(tmp_path / "a-0"), training(tmp_path / "a-1", state=longer)]))
    assert numbers["arms"][0]["name"] == "a" and numbers["curves"][0]["series"][0]["steps"] == [1, 2]


def test_intervals_are_students() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 7, 29, 200):
        assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
        assert t_quantile(degrees, 0.8) == pytest.approx(stats.t.ppf(0.9, degrees), rel=1e-9)
    mean, half = interval([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.7476, "share", "74.8 %"),
        (0.0123, "nats", "0.012"),
        (12.345, "nats", "12.35"),
        (123.45, "", "123.5"),
        (2e-6, "", "2.00e-06"),
        (3, "", "3"),
        (87.26, "degrees", "87.3°"),
    ],
)
def test_numbers_as_text(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text
