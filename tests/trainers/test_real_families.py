"""Two steps of training and an evaluation of every family, from a checkpoint on disk with its real processor."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import slow_beyond
from real_checkpoints import REAL_FAMILIES, pair, photo_samples
from tiny import trainer_options

import vgs
from vgs.trainers.grpo_settings import VGSGRPOConfig

#: Those that run every time: each has a way of its own to hold pictures.
USUAL = ("qwen2_5_vl", "internvl", "llava_pixtral", "gemma4", "smolvlm")
FAMILIES = slow_beyond(USUAL, REAL_FAMILIES)
Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_and_an_evaluation(tmp_path: Path, checkpoint: Checkpoint, family: str) -> None:
    samples = photo_samples(tmp_path / "photos")
    options = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 2, "learning_rate": 1e-3, "lam": 0.5}
    trainer = vgs.VGSTrainer(
        **pair(checkpoint, family),
        args=vgs.VGSConfig(**trainer_options(tmp_path / "run", max_steps=2, max_prompt_length=200, **options)),
        train_dataset=samples * 2,
        eval_dataset=samples,
    )
    seen: list[Any] = []
    original = trainer.compute_loss

    def spy(model: Any, inputs: dict[str, Any], **given: Any) -> Any:
        seen.extend(inputs["groups"])
        return original(model, inputs, **given)

    trainer.compute_loss = spy
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    forbidden = torch.tensor(trainer.placeholder_ids)
    assert not any(torch.isin(response, forbidden).any() for group in seen for response in group.responses)
    expected = {
        tuple(x.prompt_ids.tolist()) for x in vgs.encode_groups(trainer.processing_class, samples, [()] * 3, [])
    }
    assert {tuple(group.prompt_ids.tolist()) for group in seen} <= expected
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    assert math.isfinite(metrics["eval_loss"])


@pytest.mark.parametrize("family", ["internvl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_reinforcement_learning_scores_the_same_prompts(tmp_path: Path, checkpoint: Checkpoint, family: str) -> None:
    """Also the log-probabilities that the host asks for, and rewards that look at the pictures."""
    samples = [{**sample, "answer": "seven"} for sample in photo_samples(tmp_path / "photos")]
    shown: list[Any] = []

    def colours(completions: list, images: list, prompts: list, **columns: Any) -> list[float]:
        shown.extend(zip(images, prompts, strict=True))
        return [float(len(completion[-1]["content"])) for completion in completions]

    options = {"per_device_train_batch_size": 6, "num_generations": 2, "num_iterations": 2, "alpha": 0.5}
    trainer = vgs.VGSGRPOTrainer(
        **pair(checkpoint, family),
        args=VGSGRPOConfig(**trainer_options(tmp_path / "run", max_steps=2, **options)),
        reward_funcs=[colours],
        train_dataset=samples,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert {len(images) for images, _ in shown} == {0, 1, 2}
    for images, prompt in shown:
        parts = [part for message in prompt for part in message["content"]]
        assert [part["image"] for part in parts if part["type"] == "image"] == images
