"""The demo in its quick mode, and the pictures."""

from __future__ import annotations

import json

import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("trl")

from vgs.digits import demo
from vgs.digits.plots import AnswerSheet, ColouredAnswer, answer_sheets, learning_curves
from vgs.digits.short_runs import smooth

TIMES = ("seconds", "seconds_per_step")


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMES}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo.run_demo(folder / "out", cache=folder / "cache", quick=True)


def test_quick_demo_writes_results_and_pictures(quick):
    folder, results = quick
    stored = json.loads((folder / "out" / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert {run["arm"] for run in stored["runs"]} == set(demo.ARMS)
    for run in stored["runs"]:
        assert run["curves"]["step"] == list(range(1, stored["settings"]["steps"] + 1))
        assert run["validation"]["step"] == run["curves"]["step"]
        assert run["seconds_per_step"] > 0
    for name in ("learning_curves.png", "answers.png"):
        with Image.open(folder / "out" / name) as picture:
            assert min(picture.size) > 200 and len(picture.convert("L").resize((64, 64)).getcolors()) > 10


@pytest.mark.slow
def test_quick_demo_is_reproducible_and_uses_the_cache(quick, monkeypatch):
    folder, results = quick
    monkeypatch.setattr("vgs.digits.pretraining.train_supervised", None)  # calling it again would fail
    again = demo.run_demo(folder / "again", cache=folder / "cache", quick=True)
    assert without_times(again) == without_times(results)


def test_arms_differ_only_in_the_objective(quick):
    plain, steered = quick[1]["runs"]
    assert (plain["arm"], steered["arm"]) == ("plain", "VGS")
    assert plain["eta"] == 1.0 and 0 < steered["eta"] < 1
    assert plain["curves"]["standard"][0] == pytest.approx(steered["curves"]["standard"][0], rel=1e-4)


def test_table_gives_mean_and_spread():
    def run(arm: str, right: float) -> dict:
        terms = dict.fromkeys(demo.TERMS, 0.5)
        return {
            "arm": arm,
            "test": {"answers": right, "digits": 0.9},
            "terms": terms,
            "eta": 0.4,
            "seconds_per_step": 1,
        }

    results = {
        "before": run("before", 0.5),
        "runs": [run("plain", 0.7), run("plain", 0.8), run("VGS", 0.6), run("VGS", 0.9)],
        "teacher": {"answers": 0.95},
        "settings": {"test_size": 10, "seeds": [0, 1]},
        "seconds": {"total": 1.0},
    }
    lines = {line.split()[0]: line for line in demo.table(results).splitlines() if line.strip()}
    assert "50.0 %" in lines["before"] and "±" not in lines["before"]
    assert "75.0 ± 7.1 %" in lines["plain"] and "0.40 ± 0.00" in lines["plain"]
    found = [line for line in demo.table(results).splitlines() if line.split()[:1] == ["VGS"]]
    assert "75.0 ± 21.2 %" in found[0]
    # Differences of -10 and 10 points: a standard deviation of 14.1, and t of one degree of freedom is 12.7.
    assert found[1].startswith("VGS - plain: +0.0 ± 127.1 points of answers right")


def test_smooth_is_a_trailing_mean():
    assert smooth([1, 2, 3, 4], window=2) == [1, 1.5, 2.5, 3.5]


def test_learning_curves_draw_every_panel(tmp_path):
    curves = {"a": [([1, 2], [0.1, 0.2]), ([1, 2], [0.3, 0.1])], "b": [([1, 2], [0.2, 0.2])]}
    learning_curves(tmp_path / "one.png", {"x": curves}, "title")
    learning_curves(tmp_path / "four.png", {str(i): curves for i in range(4)}, "title")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "four.png") as four:
        assert four.size[0] > one.size[0] and four.size[1] > one.size[1]


def test_answer_colours_follow_the_values(tmp_path):
    picture = Image.new("RGB", (32, 16), "black")

    def drawn(name: str, values: list[float]) -> bytes:
        sheet = AnswerSheet(picture, "question ?", "two", [ColouredAnswer("who", ["one", "two"], values, False)])
        answer_sheets(tmp_path / name, [sheet], "title", "nats")
        with Image.open(tmp_path / name) as image:
            return image.convert("RGB").tobytes()

    assert drawn("a.png", [0.0, 2.0]) == drawn("b.png", [0.0, 2.0]) != drawn("c.png", [2.0, 0.0])
