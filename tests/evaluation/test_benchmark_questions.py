"""How rows of the paper's benchmarks are asked and scored, without lmms-eval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_rows import PLACES, RECORDED, Recorded, picture, with_pictures

from vgs.evaluation.benchmarks import harness, questions, scoring
from vgs.evaluation.benchmarks.paper import BENCHMARKS

CASES = [pytest.param(name, item, id=f"{name}-{i}") for name, items in RECORDED.items() for i, item in enumerate(items)]


class Loader(yaml.SafeLoader):
    """YAML whose functions stay names."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task(name: str) -> dict[str, Any]:
    return yaml.load((harness.TASKS / f"{name}.yaml").read_text(), Loader)


def function(name: str, key: str) -> Any:
    module, _, attribute = task(name)[key].rpartition(".")
    return getattr({questions.__name__: questions, scoring.__name__: scoring}[module], attribute)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(questions.SETTINGS_VARIABLE, raising=False)
    questions.eval_settings.cache_clear()


def colour_of(image: Any) -> str:
    known = ("red", "blue", "white", "clear", "palette")
    return next(x for x in known if questions._picture(picture(x)).tobytes() == image.tobytes())


@pytest.mark.parametrize(("name", "item"), CASES)
def test_a_row_is_asked_with_its_pictures_in_their_places(name: str, item: Recorded) -> None:
    (message,) = function(name, "doc_to_messages")(with_pictures(item.row))
    assert message["role"] == "user"
    texts = [part["text"] if part["type"] == "text" else f"[{colour_of(part['url'])}]" for part in message["content"]]
    assert "".join(texts) == item.asked
    shown = function(name, "doc_to_visual")(with_pictures(item.row))
    assert all(image.mode == "RGB" for image in shown)
    assert sorted(colour_of(image) for image in shown) == sorted(x[1:-1] for x in texts if x.startswith("["))


@pytest.mark.parametrize(("name", "item"), CASES)
def test_responses_are_scored_one_by_one(name: str, item: Recorded) -> None:
    row = {key: value for key, value in item.row.items() if not key.startswith("image") and key != "decoded_image"}
    found = function(name, "process_results")(row, [*item.right, *item.wrong])
    expected = dict(zip((*item.right, *item.wrong), [1.0] * len(item.right) + [0.0] * len(item.wrong), strict=True))
    assert dict(zip((*item.right, *item.wrong), found["scores"], strict=True)) == expected
    assert found["acc"] == pytest.approx(len(item.right) / len(expected))


def test_every_benchmark_has_its_task_and_its_dataset() -> None:
    assert set(BENCHMARKS) == set(RECORDED) == set(PLACES)
    assert yaml.safe_load((harness.TASKS / "paper.yaml").read_text())["task"] == [f"vgs_{name}" for name in BENCHMARKS]
    for name, (place, config, split) in PLACES.items():
        config_of_task = task(name)
        assert config_of_task["task"] == f"vgs_{name}"
        assert config_of_task["dataset_path"] == place
        assert config_of_task.get("dataset_name", "default") == config
        assert config_of_task["test_split"] == split
        assert BENCHMARKS[name].dataset.startswith(place) and BENCHMARKS[name].dataset.endswith(split)


def test_the_runs_system_prompt_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"settings": {"system_prompt": "Think in <reason></reason>."}, "files": {}}))
    monkeypatch.setenv(questions.SETTINGS_VARIABLE, str(path))
    row = with_pictures(RECORDED["logicvista"][0].row)
    system, user = questions.logicvista_messages(row)
    assert system == {"role": "system", "content": [{"type": "text", "text": "Think in <reason></reason>."}]}
    assert user["role"] == "user"


@pytest.mark.parametrize(
    ("text", "count", "blocks"),
    [
        ("no mark", 2, ["0", "1", "no mark"]),
        ("<image 2> then <image 1>", 2, ["1", " then ", "0"]),
        ("only <image 2>", 2, ["0", "only ", "1"]),
        ("<image 1>, <image 1> again", 1, ["0", ", image 1 again"]),
        ("a mark <image 3> too many", 1, ["0", "a mark  too many"]),
        ("", 1, ["0"]),
    ],
)
def test_marks_are_places(text: str, count: int, blocks: list[str]) -> None:
    found = questions.content(text, [str(i) for i in range(count)])
    assert [part.get("text", part.get("url")) for part in found] == blocks


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Find x\nChoices:\nA:1\nB:2", ["1", "2"]),
        ("Find x\nChoices:\nA. 1\nB. 2 cm\n", ["1", "2 cm"]),
        ("Find x\nChoices:\nB:1\nC:2", []),  # no letters from A on: the letter alone counts
        ("Find x", []),
    ],
)
def test_options_within_a_question(question: str, options: list[str]) -> None:
    row = {"question": "", "question_for_eval": question, "question_type": "multi-choice"}
    assert questions.mathverse_options(row) == options
    assert questions.mathverse_options({**row, "question_type": "free-form"}) == []


def test_rows_and_columns_are_no_set() -> None:
    """As a formula, 6,5 would equal 5,6."""
    assert not scoring.blind_is_right("{6}{5}", "5,6", "Counting Grid - Word Grids")
