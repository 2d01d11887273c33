"""The study of reinforcement learning in its quick mode, and how it is summarised."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from vgs.digits.studies import grpo
from vgs.reports.statistics import interval


@pytest.mark.slow
def test_the_quick_study_writes_results_and_a_picture(tmp_path) -> None:
    results = grpo.run_study(tmp_path / "out", cache=tmp_path / "cache", quick=True)
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["runs"] == results["runs"] and set(stored["summary"]) == set(grpo.ARMS)
    for run in stored["runs"]:
        assert run["curves"]["step"] == run["validation"]["step"] == [1, 2]
        assert len(run["curves"]["reward"]) == 2 and 0 <= run["test"]["answers"] <= 1
    rewards = [run["curves"]["reward"][0] for run in stored["runs"]]
    assert len(set(rewards)) == 1, "the first rollouts are the same in all arms"
    with Image.open(tmp_path / "out" / "grpo.png") as picture:
        assert min(picture.size) > 200


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5)
    assert math.isnan(interval([1.0])[1])


def run(arm: str, seed: int, right: float) -> dict:
    return {
        "arm": arm,
        "seed": seed,
        "test": {"answers": right, "digits": 0.9},
        "curves": {"reward": [0.0] * 5 + [0.5] * 10},
        "seconds_per_step": 0.5,
    }


def test_gains_are_taken_seed_by_seed() -> None:
    plain, steered = list(grpo.ARMS)[1:]
    runs = [run("GRPO", seed, 0.5 + seed / 10) for seed in (0, 1)]
    runs += [run(plain, seed, 0.6 + seed / 10) for seed in (0, 1)] + [run(steered, seed, 0.7) for seed in (0, 1)]
    summary = grpo.summarise(runs)
    assert summary[plain]["gain"] == pytest.approx((0.1, 0.0), abs=1e-9)
    assert summary[steered]["gain"][0] == pytest.approx(0.15) and summary[steered]["gain"][1] > 0.5
    assert summary["GRPO"]["reward"][0] == 0.5
    before = {"test": {"answers": 0.4, "digits": 0.8}, "teacher": {"answers": 0.95}}
    text = grpo.table(
        {"before": before, "summary": summary, "settings": {"test_size": 10, "seeds": [0, 1]}, "seconds": 1.0}
    )
    (line,) = [line for line in text.splitlines() if line.strip().startswith(plain)]
    assert "65.0 ± 63.5 %" in line and "10.0 ± 0.0 %" in line
