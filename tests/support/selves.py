"""Self-distilling trainers for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny_image, tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import ScriptedTrainer

from vgs.trainers.self_distillation import SelfDistillationConfig, SelfDistillationTrainer


def privileged_samples(count: int = 8) -> list[dict]:
    """The tiny samples with another picture that only the teacher sees."""
    return [
        {**sample, "privileged_images": [tiny_image(100 + index)]} for index, sample in enumerate(tiny_samples(count))
    ]


def make_self_trainer(
    tmp_path: Path, *, samples: Any = None, student: Any = None, peft_config: Any = None, **options: Any
) -> SelfDistillationTrainer:
    """A trainer of a tiny model on 8 samples, 3 for evaluation."""
    return SelfDistillationTrainer(
        model=tiny_model(0) if student is None else student,
        args=SelfDistillationConfig(**trainer_options(tmp_path, **options)),
        train_dataset=privileged_samples(8) if samples is None else samples,
        eval_dataset=privileged_samples(3),
        processing_class=tiny_processor(),
        peft_config=peft_config,
    )


class ScriptedSelfTrainer(SelfDistillationTrainer):
    """Its responses depend on the prompt alone."""

    _generate_single_turn = ScriptedTrainer._generate_single_turn
