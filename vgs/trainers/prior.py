"""The prior p_x inside the steered target q*, from the student as it was at the start or from its average.

The live prior drifts with the student: where the student's two views hardly differ, the target feeds back on itself and
training can collapse. A prior that stands still, or moves slowly, takes that feedback away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from ..models.averaged import StudentCopy
from ..models.groups import PromptGroup, response_lengths, select_responses
from ..models.heads import Head
from ..models.wrappers import run_inside
from ..teachers.protocol import TeacherRows
from .step import StepScorer


class CopyFollower(TrainerCallback):
    """Keeps a copy of a trainer's student up to date, from the start of the training, and in its checkpoints.

    Args:
        trainer: with ``HostHooks``; this is added to its callbacks and to what its checkpoints hold.
        copy: the copy.

    Raises:
        ConfigError: see ``StudentCopy.check``.
    """

    def __init__(self, trainer: Any, copy: StudentCopy) -> None:
        accelerator = trainer.accelerator
        kind = accelerator.distributed_type
        flat = kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2)
        copy.check(trainer.student, flat=flat)
        self.trainer, self.copy = trainer, copy
        trainer.add_callback(self)
        trainer.resume.parts.append(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self.trainer.resume.pending is None and not self.copy.taken:
            self.copy.take(self.trainer.student)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.copy.update(self.trainer.student)

    def save(self, folder: str) -> None:
        self.copy.save(folder, write=self.trainer.accelerator.is_main_process)

    def load(self, folder: str) -> None:
        self.copy.load(folder, self.trainer.student)


class Prior:
    """A prior with weights of its own: the student's as they were (``"frozen"``) or on average (``"ema"``).

    Args:
        trainer: whose student it is; see ``CopyFollower``.
        source: ``"frozen"`` or ``"ema"``.
        decay: of the average, per optimizer step.

    Attributes:
        copy: the weights.
    """

    def __init__(self, trainer: Any, source: str, decay: float) -> None:
        self.copy = StudentCopy(source, decay, role="prior")
        self._trainer = trainer
        CopyFollower(trainer, self.copy)

    def head(self, student: nn.Module, dtype: torch.dtype) -> Head:
        """The output head that the prior's rows go with, as constants."""
        return self.copy.head(student, dtype)

    def add_rows(
        self, scorer: StepScorer, groups: Sequence[PromptGroup], teacher: Sequence[TeacherRows]
    ) -> list[TeacherRows]:
        """The teacher's part of a batch with the prior's hidden states beside it, as the view ``"prior"``.

        Args:
            scorer: knows the passes.
            groups: prompts with their responses.
            teacher: one entry per response.
        """
        rows = self.rows(scorer, groups)
        return [replace(entry, rows={**entry.rows, "prior": own}) for entry, own in zip(teacher, rows, strict=True)]

    @torch.no_grad()
    def rows(self, scorer: StepScorer, groups: Sequence[PromptGroup]) -> list[Tensor]:
        """[T, Ds] hidden states of every response without the image, from the prior's weights."""
        student, found = self._trainer.student, {}
        texts = [replace(group, prompt_ids=group.text_prompt_ids, images={}) for group in groups]
        wrapper = self._trainer.model_wrapped if scorer.sharded else student
        with self.copy.in_place(student), scorer.accelerator.autocast():
            for chosen in scorer.rollout_passes(texts, shared=scorer.sharded):
                part = select_responses(texts, chosen)
                task = partial(scorer.plain_rows, student, part)
                _, rows = run_inside(wrapper, task)
                found |= dict(zip(chosen, rows.split(response_lengths(part)), strict=True))
        return [found[index] for index in sorted(found)]
