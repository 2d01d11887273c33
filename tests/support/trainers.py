"""Trainers for the tests.

Sampling differs between ranks by design; scripted responses make runs comparable that split the same batch differently.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options
from torch import nn

from vgs import VGSConfig, VGSTrainer
from vgs.trainers.passes import backward


def make_trainer(
    tmp_path: Path, *, student: nn.Module | None = None, samples=None, scorer=None, **options
) -> VGSTrainer:
    """A trainer of a tiny student and a wider teacher on 8 samples, 5 for evaluation."""
    samples = tiny_samples(8) if samples is None else samples
    return VGSTrainer(
        model=student or tiny_model(0),
        teacher_model=tiny_model(1, hidden=48),
        args=VGSConfig(**trainer_options(tmp_path, **options)),
        train_dataset=samples,
        eval_dataset=tiny_samples(5),
        processing_class=tiny_processor(),
        scorer=scorer,
    )


def rollout(trainer: VGSTrainer) -> dict:
    """One generated training batch with the teacher's part, before it is split."""
    trainer.model.train()
    return trainer.with_teacher(trainer.sample(list(trainer.train_dataset)))


def loss_of(trainer: VGSTrainer, batch: dict) -> torch.Tensor:
    """The loss of one micro-batch."""
    trainer.current_gradient_accumulation_steps = 1  # the host sets it when it trains
    return trainer.compute_loss(trainer.model, batch)


def loss_and_gradients(trainer: VGSTrainer, batch: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """A micro-batch's loss and gradient, through however many backward passes."""
    trainer.model.zero_grad()
    loss = loss_of(trainer, batch)
    backward(trainer.accelerator, loss)
    return loss.item(), {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


class ScriptedTrainer(VGSTrainer):
    """Its responses depend on the prompt alone."""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False) -> list[list[int]]:
        responses = []
        for ids in prompt_ids:
            key = sum(position * token for position, token in enumerate(ids))
            words = [8 + (key * step) % 20 for step in range(1, 2 + key % 5)]
            responses.append([*words, self._tokenizer.eos_token_id])
        return responses


#: Settings of runs that are compared: a step is the gradient, unclipped.
PLAIN_SGD = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "lam": 0.5}


def scripted_run(output_dir: Path, batch_size: int, accumulation: int, **options) -> ScriptedTrainer:
    """Two SGD steps over the same 8 samples, however they are split; gradients are not clipped."""
    args = trainer_options(
        output_dir,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **PLAIN_SGD,
        **options,
    )
    trainer = ScriptedTrainer(
        model=tiny_model(0),
        teacher_model=tiny_model(1, hidden=48),
        args=VGSConfig(**args),
        train_dataset=tiny_samples(8),
        processing_class=tiny_processor(),
    )
    trainer.train()
    return trainer


def pair_loss(student: torch.nn.Module) -> torch.Tensor:
    """The VGS loss of two fixed responses against a fixed teacher."""
    from vgs.data.prompts import encode_groups
    from vgs.models.families import placeholder_ids
    from vgs.models.forward import fused_loss, score_groups
    from vgs.models.groups import trajectory_ids
    from vgs.models.heads import read_head
    from vgs_kernels import VGSObjective

    teacher = tiny_model(1, hidden=48)
    responses = [[[20, 1]], [[21, 22, 1]]]
    groups = encode_groups(tiny_processor(), tiny_samples(2), responses, placeholder_ids(student.config))
    rows = score_groups(student, groups)
    with torch.no_grad():
        teacher_rows = score_groups(teacher, groups)
    heads = read_head(student, rows[0].dtype), read_head(teacher, rows[0].dtype)
    return fused_loss(rows, teacher_rows, *heads, VGSObjective(lam=0.5), trajectory_ids=trajectory_ids(groups)).loss
