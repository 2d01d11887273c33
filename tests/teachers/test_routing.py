"""Several teachers, each row with its own: the loss, memory, and rows that name none."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_checkpoints import photo_samples
from teachers import FAMILY, assert_same, outcome, taught
from transformers import AutoModelForImageTextToText

from vgs import VGSGRPOConfig
from vgs.errors import ConfigError
from vgs.models.forward import score_groups
from vgs.trainers import routes

Checkpoint = Callable[..., Path]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    """Three questions of two domains."""
    samples = photo_samples(tmp_path / "photos")
    return [{**sample, "domain": name} for sample, name in zip(samples, ("math", "charts", "math"), strict=True)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher: another width, and a head with more rows."""
    from real_checkpoints import real_checkpoint

    folder = real_checkpoint(FAMILY, tmp_path_factory.mktemp("other") / "model", teacher=True)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.resize_token_embeddings(model.get_output_embeddings().weight.shape[0] + 64, mean_resizing=False)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(x, marks=pytest.mark.slow) for x in ({"max_tokens_per_pass": 600}, {"schedule": "adaptive"}))],
)
def test_two_names_of_one_teacher_are_one_teacher(
    checkpoint: Checkpoint, tmp_path: Path, rows: list[dict], options: dict
) -> None:
    """The gate's threshold is that of all rows, though each teacher's rows run in passes of their own."""
    path = str(checkpoint(FAMILY, teacher=True))
    alone = outcome(taught(checkpoint, tmp_path / "a", path, rows, **options))
    both = {"math": path, "charts": path}
    routed = taught(checkpoint, tmp_path / "b", both, rows, teacher_column="domain", **options)
    assert_same(outcome(routed), alone, rtol=1e-4, atol=1e-6)


def test_each_row_has_the_states_and_the_head_of_its_teacher(
    checkpoint: Checkpoint, tmp_path: Path, rows: list[dict], other: Path
) -> None:
    paths = {"math": str(checkpoint(FAMILY, teacher=True)), "charts": str(other)}
    trainer = taught(checkpoint, tmp_path, paths, rows, teacher_column="domain")
    trainer.model.train()
    batch = trainer.with_teacher(trainer.sample(rows))
    assert [entry.teacher for entry in batch["teacher"]] == ["math", "charts", "math"]
    for group, entry in zip(batch["groups"], batch["teacher"], strict=True):
        model = AutoModelForImageTextToText.from_pretrained(paths[entry.teacher]).eval()
        with torch.no_grad():
            expected = score_groups(model, [group])
        torch.testing.assert_close(entry.rows["image"], expected[0], rtol=1e-4, atol=1e-5)
        with trainer.step_scorer.teachers[entry.teacher].head(torch.float32) as head:
            torch.testing.assert_close(head.weight, model.get_output_embeddings().weight)
    student = trainer.student.get_output_embeddings().weight.shape[0]
    assert trainer.args.vocab_size == student, "the columns that all heads have"


@pytest.mark.parametrize("option", [pytest.param("teacher_offload", marks=pytest.mark.slow), "teacher_reload"])
@pytest.mark.slow
def test_one_teacher_at_a_time_says_the_same(
    checkpoint: Checkpoint,
    tmp_path: Path,
    rows: list[dict],
    other: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = {"math": str(checkpoint(FAMILY, teacher=True)), "charts": str(other)}
    expected = outcome(taught(checkpoint, tmp_path / "a", paths, rows, teacher_column="domain"))
    seen: list[weakref.ref] = []
    original = routes.load_teacher

    def noted(*given: Any) -> torch.nn.Module:
        assert option != "teacher_reload" or not [model for model in seen if model() is not None], "one before is left"
        model = original(*given)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(routes, "load_teacher", noted)
    trainer = taught(checkpoint, tmp_path / "b", paths, rows, teacher_column="domain", **{option: True})
    assert_same(outcome(trainer), expected)
    assert len(seen) == (4 if option == "teacher_reload" else 2), "checked, then asked"


@pytest.mark.parametrize(
    ("change", "teachers", "options", "message"),
    [
        ({"domain": "maps"}, 2, {"teacher_column": "domain"}, r"one of math, charts in every row, got 'maps' in row 1"),
        ({"domain": None}, 2, {"teacher_column": "domain"}, r"got None in row 1 of train_dataset"),
        ({}, 2, {"teacher_column": "topic"}, "train_dataset has no column 'topic', which teacher_column names"),
        ({}, 2, {}, "teachers math, charts need teacher_column"),
        ({}, 1, {"teacher_column": "domain"}, "teacher_column='domain' needs several teachers by name, got one"),
        ({}, 1, {"teacher_reload": True, "teacher_offload": True}, "exclude each other"),
    ],
)
def test_what_cannot_be_routed_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, rows: list[dict], change: dict, teachers: int, options: dict, message: str
) -> None:
    path = str(checkpoint(FAMILY, teacher=True))
    given = path if teachers == 1 else {"math": path, "charts": path}
    with pytest.raises(ConfigError, match=message):
        taught(checkpoint, tmp_path, given, [rows[0], {**rows[1], **change}, rows[2]], **options)


def test_a_loaded_model_is_not_reloaded(checkpoint: Checkpoint, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(checkpoint(FAMILY, teacher=True))
    with pytest.raises(ConfigError, match="reads teacher_model from disk: give its path, not a loaded model"):
        taught(checkpoint, tmp_path, model, teacher_reload=True)


@pytest.mark.slow
def test_reinforcement_has_several_teachers(tmp_path: Path) -> None:
    """Two names of one teacher, in GRPO: the same weights after two steps."""
    from grpo_runs import ScriptedGRPO, brevity, common, options, weights
    from tiny import tiny_model, tiny_samples

    ends = []
    for number, several in enumerate((False, True)):
        column = {"teacher_column": "domain"} if several else {}
        given = common()
        rows = [{**x, "domain": ("math", "charts")[index % 2]} for index, x in enumerate(tiny_samples(8))]
        teacher = tiny_model(1, hidden=48)
        trainer = ScriptedGRPO(
            teacher_model={"math": teacher, "charts": teacher} if several else teacher,
            reward_funcs=brevity,
            args=VGSGRPOConfig(**options(tmp_path / str(number), alpha=0.5, lam=0.5, **column)),
            **given | {"train_dataset": rows},
        )
        trainer.train()
        ends.append(weights(trainer))
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6)
