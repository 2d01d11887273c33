"""Weights of checkpoints whose names are those of published files: a run goes on from them, not from its beginning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from real_checkpoints import photo_samples, real_checkpoint
from safetensors.torch import load_file
from tiny import tiny_model, trainer_options
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import VGSConfig, VGSTrainer
from vgs.errors import ConfigError
from vgs.trainers.weights import load_renamed_weights, saved_names

FAMILY = "qwen2_5_vl"  # its files have model.layers, its modules model.language_model.layers


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return real_checkpoint(FAMILY, tmp_path / "checkpoint")


def load(path: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(path)


def test_names_of_published_files_are_loaded(checkpoint: Path) -> None:
    model = load(checkpoint)
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not saved_names(checkpoint) <= set(wanted), "transformers has stopped to rename"
    assert load_renamed_weights(model, checkpoint)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_names_of_modules_are_the_hosts(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert not load_renamed_weights(model, tmp_path)
    assert not load_renamed_weights(model, tmp_path / "nothing")


def test_a_checkpoint_of_another_model(checkpoint: Path) -> None:
    with pytest.raises((ConfigError, RuntimeError)):
        load_renamed_weights(tiny_model(), checkpoint)


def test_the_best_model_is_loaded_at_the_end(checkpoint: Path, tmp_path: Path) -> None:
    """The first evaluation is the best: the weights of its checkpoint are the result."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    args = trainer_options(tmp_path / "run", **options, load_best_model_at_end=True, metric_for_best_model="loss")
    samples = [sample for sample in photo_samples(tmp_path / "photos") if sample["images"]] * 2
    trainer = VGSTrainer(
        model=load(checkpoint),
        teacher_model=load(real_checkpoint(FAMILY, tmp_path / "teacher", teacher=True)),
        args=VGSConfig(**{**args, "per_device_train_batch_size": 2, "greater_is_better": True, "eta": 1.0}),
        train_dataset=samples,
        eval_dataset=samples[:2],
        processing_class=AutoProcessor.from_pretrained(checkpoint, padding_side="left"),
    )
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    trainer.save_model(str(tmp_path / "result"))
    result = load_file(tmp_path / "result" / "model.safetensors")
    assert all(torch.equal(result[name], tensor) for name, tensor in best.items())
