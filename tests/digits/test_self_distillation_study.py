"""Self-distillation on the digits task: its pictures and notes, the config, and the study in its quick mode."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from PIL import Image

from vgs.cli import main as cli
from vgs.digits.pictures import NUMBERS, handwritten, number_words, take, vocabulary
from vgs.digits.privileged import CONTEXTS, Question, build, label_note, lessons, questions
from vgs.digits.studies import self_distillation as study
from vgs.digits.studies.plots import gap_study

CONFIG = Path(__file__).parents[2] / "configs" / "digits_visual_opsd.yaml"


def test_privileged_pictures_are_clean_and_show_the_same_digits() -> None:
    for question in questions("validation", 20):
        example, sample = question.example, question.sample
        (clean,), (noisy,) = sample["privileged_images"], sample["images"]
        assert clean.size == noisy.size == example.image.size
        light, dark = (np.asarray(image, dtype=float)[..., 0] for image in (clean, noisy))
        digits = handwritten()[0][list(example.source)]
        cells = np.split(light, len(digits), axis=1)
        for cell, digit in zip(cells, digits, strict=True):
            small = np.asarray(Image.fromarray(cell.astype(np.float32)).resize((8, 8), Image.Resampling.BOX)) / 255
            assert np.corrcoef(small.ravel(), digit.ravel())[0, 1] > 0.9
        assert np.median(dark) > 60 and light.min() == 0, "a grey ground"
        assert dark.std() < 0.6 * light.std(), "faint"


def test_notes_name_every_digit_in_known_words() -> None:
    words = set(vocabulary())
    for example in take("validation", 30, 0):
        note = label_note(example)
        assert number_words(note) == handwritten()[1][list(example.source)].tolist()
        assert set(note.split()) <= words and ("middle" in note) == (len(example.source) == 3)


def test_the_dataset_has_what_the_trainer_needs() -> None:
    for context in CONTEXTS:
        rows = build("train", 3, seed=4, context=context)
        for row, question in zip(rows, questions("train", 3, 4, context), strict=True):
            assert row["answer"] == question.answer and row["prompt"] == question.sample["prompt"]
            assert row["images"][0].tobytes() == question.sample["images"][0].tobytes()
        assert set(rows.column_names) - {"prompt", "images", "answer"} == {
            "privileged_images" if context == "clean" else "privileged_text"
        }
    with pytest.raises(ValueError, match="context must be one of clean, labels, got 'dirty'"):
        build("train", 1, context="dirty")


def test_a_shown_question_is_what_the_teacher_sees() -> None:
    (clean,) = questions("validation", 1, shown=True)
    assert len(clean.record()["images"]) == 2
    (labels,) = questions("validation", 1, context="labels", shown=True)
    record = labels.record()
    assert len(record["images"]) == 1 and record["prompt"][0]["content"].endswith(label_note(labels.example))
    assert replace(labels, shown=False).record()["prompt"][0]["content"] == labels.example.question


def test_the_reader_never_learns_faint_pictures() -> None:
    """It sees the task's own without context, and very noisy ones with context."""
    batch = next(lessons(study.quick_study().recipe, 0))
    seen = []
    for record, target in batch:
        content, pictures = record["prompt"][0]["content"], record["images"]
        first = np.asarray(pictures[0], dtype=float)[..., 0]
        assert target and np.median(first) < 50, "no grey ground"
        rough = np.abs(np.diff(first, axis=1)).mean() > 35
        assert rough == (len(pictures) == 2 or "\n" in content)
        seen.append((len(pictures), "\n" in content))
    assert seen == [(1, False), (2, False), (1, True), (1, True), (1, False), (2, False)]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("study")
    options = ["--out", str(folder / "out"), "--cache", str(folder / "cache"), "--quick"]
    assert cli.main(["study", "self-distillation", *options]) == 0
    return folder, json.loads((folder / "out" / "results.json").read_text())


@pytest.mark.slow
def test_the_quick_study_writes_results_and_a_picture(quick: tuple[Path, dict]) -> None:
    folder, results = quick
    assert [run["arm"] for run in results["runs"]] == list(study.ARMS)
    for run in (results["before"], *results["runs"]):
        assert set(run["test"]) == {"plain", *CONTEXTS}
        assert all(value >= 0 for key in ("gap", "to_start") for value in run[key].values())
    assert results["before"]["gap"] == pytest.approx(results["before"]["to_start"])
    for run in results["runs"]:
        assert run["curves"]["step"] == run["validation"]["step"] == [1, 2]
    losses = {run["arm"]: run["curves"]["divergence"][0] for run in results["runs"]}
    assert len(set(losses.values())) == len(losses), "every arm has another target"
    with Image.open(folder / "out" / "self_distillation.png") as picture:
        assert min(picture.size) > 400 and len(picture.convert("L").resize((64, 64)).getcolors()) > 10


@pytest.mark.slow
def test_the_config_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgs.digits import privileged as digits_privileged

    recipe = study.quick_study().recipe
    reader = digits_privileged.reader
    monkeypatch.setattr(digits_privileged, "reader", lambda cache, **options: reader(cache, recipe=recipe, **options))
    changes = {
        "digits.cache": tmp_path / "cache",
        "digits.train_size": 8,
        "digits.eval_size": 4,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "'no'",
        "warmup_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    overrides = [f"--{key}={value}" for key, value in changes.items()]
    assert cli.main(["train", str(CONFIG), *overrides]) == 0
    out = tmp_path / "gap.json"
    options = ["--after", str(tmp_path / "run"), "--out", str(out)]
    assert cli.main(["kl-gap", str(CONFIG), *options, *overrides]) == 0
    assert set(json.loads(out.read_text())) == {"before", "after", "closed"}


def test_the_summary_has_t_intervals_over_seeds() -> None:
    def run(arm: str, right: float) -> dict:
        gaps = dict.fromkeys(study.GAPS, right)
        test = {"plain": {"answers": right, "digits": 0.5}}
        return {"arm": arm, "test": test, "gap": gaps, "to_start": gaps, "seconds_per_step": 1.0}

    runs = [run(arm, right) for arm in study.ARMS for right in (0.5, 0.6, 0.7)]
    found = study.summarise(run("before", 0.4), runs)["clean digits"]
    # t(0.975, 2) = 4.302653
    assert found["answers"] == pytest.approx((0.6, 4.302653 * 0.1 / math.sqrt(3)), rel=1e-5)
    assert found["gain"][0] == pytest.approx(0.2) and found["gap clean"] == found["answers"]


def test_the_picture_has_a_bar_for_each_arm(tmp_path: Path) -> None:
    curves = {"a": [([1, 2], [0.1, 0.2]), ([1, 2], [0.3, 0.1])], "b": [([1, 2], [0.2, 0.2])]}

    def drawn(gaps: dict) -> bytes:
        gap_study(tmp_path / "x.png", {"x": curves}, gaps)
        with Image.open(tmp_path / "x.png") as image:
            return image.convert("RGB").tobytes()

    bars = {"before": (0.5, math.nan), "a": (0.2, 0.1), "b": (0.3, 0.1)}
    assert drawn(bars) == drawn(bars) != drawn({**bars, "b": (0.1, 0.1)})


def test_an_unknown_context_is_refused() -> None:
    (example,) = take("test", 1, 0)
    with pytest.raises(ValueError, match="context must be one of"):
        _ = Question(example, "dirty").sample
    assert example.answer in NUMBERS
