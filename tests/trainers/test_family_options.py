"""Trainers with the newer families: budgets of tokens, frozen parts, adapters, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from real_checkpoints import pair, photo_samples
from tiny import trainer_options
from trainers import loss_and_gradients

import vgs
from vgs.errors import ConfigError

Checkpoint = Callable[..., Path]
RARER = ("glm4v_moe", "kimi_k25", "gemma4_moe", "gemma4_unified", "mistral4", "granite4_vision")
FAMILIES = ["gemma4_small", "qwen3_vl_moe", *[pytest.param(family, marks=pytest.mark.slow) for family in RARER]]


def trainer_of(checkpoint: Checkpoint, family: str, folder: Path, *, lora: object = None, **options) -> vgs.VGSTrainer:
    """Three prompts with two responses each, in one batch."""
    chosen = {"per_device_train_batch_size": 6, "num_generations": 2, "max_steps": 1, "lam": 0.5, "eta": 0.5, **options}
    return vgs.VGSTrainer(
        **pair(checkpoint, family),
        args=vgs.VGSConfig(**trainer_options(folder / "run", **chosen)),
        train_dataset=photo_samples(folder / "photos"),
        peft_config=lora,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_of_tokens_and_checkpointing_leave_the_gradient_alone(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trainer = trainer_of(checkpoint, family, tmp_path, gamma_guard=False)  # one batch is asked twice
    assert trainer.packs
    # Dropout inside a projector would draw anew; sampling needs the evaluation mode anyway.
    trainer.model.train()
    for part in trainer.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    samples = [sample for sample in trainer.train_dataset for _ in range(2)]
    batch = trainer.with_teacher(trainer.sample(samples))
    assert [len(group.responses) for group in batch["groups"]] == [2] * 3
    loss, expected = loss_and_gradients(trainer, batch)
    trainer.args.max_tokens_per_pass = max(group.tokens() for group in batch["groups"])  # one prompt in both views
    trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = trainer.with_teacher(batch)
    assert len(trainer.plan_passes(batch, 1.0, trainer.objective, terms=False).passes) > 1
    again, gradient = loss_and_gradients(trainer, batch)
    assert again == pytest.approx(loss, rel=1e-5)
    assert gradient.keys() == expected.keys()
    largest = max(x.abs().max() for x in expected.values())
    for name, value in expected.items():
        assert (gradient[name] - value).abs().max() <= 2e-5 * largest, name


@pytest.mark.parametrize("family", [x for x in FAMILIES if "gemma4_unified" not in str(x)])
def test_frozen_parts_stay_and_the_rest_trains(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    trainer = trainer_of(checkpoint, family, tmp_path, freeze_vision=True, freeze_embeddings=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(".layers.1." in name for name in moved)
    assert not any("embed_tokens" in name or "vision_tower" in name or "visual." in name for name in moved)
    assert not any("lm_head" in name for name in moved)  # tied


def test_a_tower_that_is_not_there_is_refused_at_the_start(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"freeze_vision is true, but Gemma4Unified.* has no vision tower"):
        trainer_of(checkpoint, "gemma4_unified", tmp_path, freeze_vision=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_alone_train(family: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.self_attn\.o_proj")
    trainer = trainer_of(checkpoint, family, tmp_path, lora=lora)
    assert trainer.packs
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
