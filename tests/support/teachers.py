"""Trainers whose teachers come from somewhere, on real tiny checkpoints, and what is compared between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from real_checkpoints import pair, photo_samples
from tiny import trainer_options
from trainers import loss_and_gradients, rollout

from vgs import VGSConfig, VGSTrainer

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
