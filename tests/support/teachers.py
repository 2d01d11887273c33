"""Trainers whose teachers come from somewhere, on real tiny checkpoints, and what is compared between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_checkpoints import pair, photo_samples, photos
from tiny import trainer_options
from trainers import loss_and_gradients, rollout
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import VGSConfig, VGSTrainer
from vgs.cli import main as cli
from vgs.data.sources import DataSource, load_samples

FAMILY = "qwen2_5_vl"
SETTINGS = {"eta": 0.5, "lam": 0.5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 1}


def taught(checkpoint: Callable[..., Path], folder: Path, teacher: Any, samples: list[dict] | None = None, **options):
    """A trainer of the tiny student on three photo questions, with any kind of teacher."""
    models = pair(checkpoint, FAMILY) | {"teacher_model": teacher}
    samples = photo_samples(folder / "photos") if samples is None else samples
    args = VGSConfig(**trainer_options(folder / "run", **{**SETTINGS, **options}))
    return VGSTrainer(**models, args=args, train_dataset=samples, eval_dataset=samples)


@contextmanager
def scripted(trainer: VGSTrainer, responses: list[list[int]]) -> Iterator[None]:
    """The student says these, one after the other, whatever it is asked."""
    original = trainer._generate_single_turn
    trainer._generate_single_turn = lambda prompts, *_, **__: list(islice(cycle(responses), len(prompts)))
    try:
        yield
    finally:
        trainer._generate_single_turn = original


#: Of different lengths; ids of plain words.
RESPONSES = [[40, 41, 42, 43], [44, 45], [46, 47, 48]]


def outcome(trainer: VGSTrainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch of scripted responses."""
    with scripted(trainer, RESPONSES):
        batch = rollout(trainer)
    return loss_and_gradients(trainer, batch)


def assert_same(found: tuple, expected: tuple, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Two outcomes, to the given tolerances."""
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=rtol, atol=atol)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=rtol, atol=atol)


def recorded_config(checkpoint: Callable[..., Path], folder: Path, **training: Any) -> dict:
    """A config whose four photo questions have two recorded responses each; its files are in ``folder``."""
    paths = photos(folder / "photos")
    rows = [
        {
            "question": "what is in the picture ?" if number % 2 else "seven or nine ?",
            "answer": "seven",
            "images": [f"photos/{path.name}"] if number else [],
            "responses": [ANSWERS[number], ANSWERS[number][:7]],
        }
        for number, path in enumerate(paths)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = SETTINGS | {"per_device_train_batch_size": 4, "max_completion_length": 12} | training
    return {
        "student": {"path": str(checkpoint(FAMILY))},
        "teacher": {"path": str(checkpoint(FAMILY, teacher=True))},
        "data": {"train": {"path": str(folder / "data.jsonl"), "responses": "responses"}},
        "training": trainer_options(folder / "run", on_policy_fraction=0.0, max_steps=1) | settings,
    }


ANSWERS = ("seven or nine", "nine squares in it", "the second picture", "two")


def recorded_trainer(config: dict, teacher: Any = None, **options: Any) -> VGSTrainer:
    """A trainer of a config, on its data, with any kind of teacher (None: the config's path)."""
    data = load_samples(DataSource(**config["data"]["train"]))
    student, path = config["student"]["path"], config["teacher"].get("path")
    return VGSTrainer(
        model=AutoModelForImageTextToText.from_pretrained(student, attn_implementation="sdpa"),
        teacher_model=path if teacher is None else teacher,
        args=VGSConfig(**config["training"] | options),
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(student),
    )


def command(name: str, config: dict, *options: str) -> int:
    """The exit status of a ``vgs`` command on a config, whose file is written into the working directory."""
    Path("run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return cli.main([name, "run.yaml", *options])


def refused(capsys: pytest.CaptureFixture, name: str, config: dict, *options: str) -> str:
    """The one sentence with which a command ends, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(name, config, *options)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]
