"""Scores read back, intervals and paired tests against SciPy and by hand, and the tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vgs.errors import ConfigError
from vgs.evaluation.benchmarks import evaluate, statistics, tables
from vgs.evaluation.benchmarks.paper import BENCHMARKS, PAPER_MEANS
from vgs.evaluation.benchmarks.results import TaskScores, read_scores
from vgs.evaluation.benchmarks.settings import EvalSettings


def scores(*rows: list[float]) -> TaskScores:
    return TaskScores(tuple((i, f"hash{i}") for i in range(len(rows))), np.array(rows, dtype=np.float64))


def drawn(count: int, repeats: int, chance: float, seed: int) -> TaskScores:
    generator = np.random.default_rng(seed)
    return scores(*(generator.random((count, repeats)) < chance).astype(float).tolist())


def write_samples(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def sample(number: int, given: list[float], tokens: int = 5, text: str = "question") -> dict[str, Any]:
    row = {"doc_id": number, "input": text, "target": "B", "scores": given, "acc": sum(given) / len(given)}
    return {**row, "token_counts": [{"output_tokens": tokens}]}


# reading


def test_samples_are_read_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    rows = [sample(2, [0.0, 1.0]), sample(0, [1.0, 1.0], tokens=8), sample(1, [0.0, 0.0])]
    found = read_scores(write_samples(tmp_path, rows), 2, max_new_tokens=8)
    assert found.scores.tolist() == [[1, 1], [0, 0], [0, 1]]
    assert [number for number, _ in found.questions] == [0, 1, 2]
    assert found.cut_off == pytest.approx(1 / 3)


def test_a_question_is_known_by_its_text_and_answer(tmp_path: Path) -> None:
    first, again, other = (
        read_scores(write_samples(tmp_path / name, [sample(0, [1.0], text=text)]), 1).questions
        for name, text in (("a", "one"), ("b", "one"), ("c", "two"))
    )
    assert first == again != other


def test_lengths_that_were_not_recorded_are_not_made_up(tmp_path: Path) -> None:
    rows = [{**sample(0, [1.0]), "token_counts": [None]}]
    assert read_scores(write_samples(tmp_path, rows), 1, max_new_tokens=8).cut_off is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a line for every question, got none"),
        ([sample(0, [1.0]), sample(0, [1.0])], "has a question twice"),
        ([sample(0, [1.0]), sample(1, [1.0, 0.0])], "must have 1 scores for every question, got another number for 1"),
        ([{"doc_id": 0}], "with our scores, got KeyError"),
    ],
)
def test_samples_that_are_none(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        read_scores(write_samples(tmp_path, rows), 1)


# statistics


def test_acc_1_is_wilsons() -> None:
    found = statistics.accuracy(drawn(200, 1, 0.3, 0))
    right = round(found["accuracy"] * 200)
    z, n, p = stats.norm.ppf(0.975), 200, right / 200
    middle, reach = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["low"] == pytest.approx((middle - reach) / (1 + z * z / n))
    assert found["high"] == pytest.approx((middle + reach) / (1 + z * z / n))
    assert found["questions"] == 200 and found["responses"] == 1


def test_acc_k_counts_questions_not_responses() -> None:
    """Sixteen equal responses to a question say no more than one."""
    one = drawn(50, 1, 0.5, 1)
    many = TaskScores(one.questions, np.repeat(one.scores, 16, axis=1))
    found, means = statistics.accuracy(many), one.scores[:, 0]
    error = means.std(ddof=1) / math.sqrt(50)
    reach = stats.t.ppf(0.975, 49) * error
    assert found["accuracy"] == pytest.approx(means.mean()) and found["error"] == pytest.approx(error)
    assert (found["low"], found["high"]) == pytest.approx((means.mean() - reach, means.mean() + reach))


def test_intervals_stay_within_0_and_1_and_are_none_without_spread() -> None:
    nearly = statistics.accuracy(scores(*[[1.0, 1.0]] * 9, [1.0, 0.0]))
    assert nearly["high"] == 1.0
    assert statistics.accuracy(scores([1.0, 1.0], [1.0, 1.0]))["low"] is None
    all_right = statistics.accuracy(scores([1.0], [1.0]))
    assert all_right["low"] < 1.0 == all_right["high"]  # Wilson's knows that two questions say little
    assert statistics.accuracy(scores([1.0]))["error"] is None


def test_the_paired_test_is_scipys() -> None:
    before, after = drawn(300, 16, 0.4, 2), drawn(300, 16, 0.45, 3)
    found = statistics.difference(after, before)
    test = stats.ttest_rel(after.scores.mean(axis=1), before.scores.mean(axis=1))
    interval = test.confidence_interval(0.95)
    assert found["p"] == pytest.approx(test.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert "mcnemar_p" not in found


def test_mcnemars_test_looks_at_questions_that_changed_sides() -> None:
    before = scores(*[[0.0]] * 9, *[[1.0]] * 1, *[[1.0]] * 40)
    after = scores(*[[1.0]] * 9, *[[0.0]] * 1, *[[1.0]] * 40)
    found = statistics.difference(after, before)
    assert (found["gained"], found["lost"]) == (9, 1)
    assert found["mcnemar_p"] == pytest.approx(2 * (1 + 10) / 2**10)
    assert found["difference"] == pytest.approx(8 / 50)


def test_two_equal_models() -> None:
    found = statistics.difference(drawn(20, 1, 0.5, 4), drawn(20, 1, 0.5, 4))
    assert found["difference"] == 0 and found["p"] is None and found["mcnemar_p"] == 1.0


def test_models_must_have_answered_the_same_questions() -> None:
    with pytest.raises(ConfigError, match="the same questions, got 3 and 2 of which 2 are the same"):
        statistics.difference(scores([1.0], [0.0], [1.0]), scores([1.0], [0.0]))


def test_the_mean_over_benchmarks_is_unweighted() -> None:
    small, large = statistics.accuracy(drawn(20, 1, 0.5, 5)), statistics.accuracy(drawn(2000, 1, 0.1, 6))
    found = statistics.mean_of([small, large], "accuracy")
    assert found["accuracy"] == pytest.approx((small["accuracy"] + large["accuracy"]) / 2)
    assert found["error"] == pytest.approx(math.hypot(small["error"], large["error"]) / 2)
    assert found["high"] - found["low"] == pytest.approx(2 * stats.norm.ppf(0.975) * found["error"])


def test_the_mean_difference_has_a_p() -> None:
    parts = [statistics.difference(drawn(100, 1, 0.6, i), drawn(100, 1, 0.4, i + 9)) for i in range(3)]
    found = statistics.mean_of(parts, "difference")
    error = math.sqrt(sum(part["error"] ** 2 for part in parts)) / 3
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(found["difference"]) / error))


# tables


def results() -> dict[str, Any]:
    names = list(BENCHMARKS)
    own, other = EvalSettings(model="runs/mine", limit=60), EvalSettings(model="Qwen/Start")
    after = {"Acc@1": {name: drawn(60, 1, 0.6, i) for i, name in enumerate(names)}}
    before = {"Acc@1": {name: drawn(60, 1, 0.4, i + 50) for i, name in enumerate(names)}}
    after["Acc@16"] = {name: drawn(60, 16, 0.6, i + 100) for i, name in enumerate(names)}
    before["Acc@16"] = {name: drawn(60, 16, 0.4, i + 150) for i, name in enumerate(names)}
    return evaluate.summarise(own, after, other, before)


def test_the_report_has_every_benchmark_and_the_paper_beside_it() -> None:
    found = results()
    json.dumps(found, allow_nan=False)
    text, markdown = tables.report(found, markdown=False), tables.report(found, markdown=True)
    for benchmark in BENCHMARKS.values():
        assert text.count(benchmark.title) == markdown.count(benchmark.title) == 5  # two models, two metrics, the paper
    for *_, first, _ in PAPER_MEANS:
        assert f"{first:.2f}" in text and f"| {first:.2f} |" in markdown
    accuracy = found["model"]["benchmarks"]["mathvision"]["Acc@16"]
    assert f"{100 * accuracy['accuracy']:.2f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]" in text
    assert "Only the first 60 questions of each benchmark: a trial." in text
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.count("|") == lines[0].count("|") for line in lines[: 2 + len(BENCHMARKS) + 1])


def test_the_papers_means_are_those_of_its_gains() -> None:
    """The gains by benchmark add up to the difference of the means, but for the misprints that the notes name."""
    means = {(size, method): first for size, method, first, _ in PAPER_MEANS}
    for size in ("2B", "4B"):
        gains = [getattr(x, f"gain_{size.lower()}") for x in BENCHMARKS.values()]
        assert means[size, "VGS"] - means[size, "plain distillation"] == pytest.approx(sum(gains) / 7, abs=0.1)


@pytest.mark.parametrize(("p", "shown"), [(None, "-"), (0.04321, "0.0432"), (1e-9, "< 0.0001"), (1.0, "1.0000")])
def test_chances(p: float | None, shown: str) -> None:
    assert tables.chance(p) == shown
