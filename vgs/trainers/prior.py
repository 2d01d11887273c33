"""The prior p_x inside the steered target q*, from the student as it was at the start or from its average.

The live prior drifts with the student: where the student's two views hardly differ, the target feeds back on itself and
training can collapse. A prior that stands still, or moves slowly, takes that feedback away.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from ..models.averaged import StudentCopy
from ..models.groups import PromptGroup, response_lengths
from .batching import select_responses
from .step import run_inside


class _Follow(TrainerCallback):
    """Keeps a trainer's copy up to date."""

    def __init__(self, trainer: KeepsCopy) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer._begin_copy()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.trainer.copy.update(self.trainer._student)


class KeepsCopy:
    """Mixin in front of ``ExactResume``: a copy that follows the student and is in the checkpoints.

    Attributes:
        copy: None until ``_keep``.
    """

    copy: StudentCopy | None = None

    @property
    def _student(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _keep(self, copy: StudentCopy) -> None:
        """Have a copy follow the student from the start of the training.

        Raises:
            ConfigError: see ``StudentCopy.check``.
        """
        kind = self.accelerator.distributed_type
        flat = kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not self.accelerator.is_fsdp2)
        copy.check(self._student, flat=flat)
        self.copy = copy
        self.add_callback(_Follow(self))

    def _begin_copy(self) -> None:
        if self._pending is None and not self.copy.taken:
            self.copy.take(self._student)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.copy is not None:
            self.copy.save(output_dir, write=self.accelerator.is_main_process)

    def _restore(self) -> None:
        checkpoint = self._pending
        super()._restore()
        if checkpoint is not None and self.copy is not None:
            self.copy.load(checkpoint, self._student)


class KeepsPrior(KeepsCopy):
    """Mixin in front of ``VGSHost`` and ``ExactResume``; its copy is the prior where that is not the student."""

    @property
    def prior(self) -> StudentCopy | None:
        """The weights that the prior is scored with; None where it is the student's own at every step."""
        return None if self.args.prior == "live" else self.copy

    def _prepare_scoring(self) -> None:
        if self.args.prior != "live":
            self._keep(StudentCopy(self.args.prior, self.args.prior_decay, role="prior"))
        super()._prepare_scoring()
        if self.prior is not None:
            self.step_scorer.prior_head = self.prior.head

    def _with_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        scored = super()._with_teacher(batch)
        if self.prior is None or self.objective.gamma == 0:
            return scored
        rows = self._score_prior(scored["groups"])
        teacher = [
            replace(entry, rows={**entry.rows, "prior": own})
            for entry, own in zip(scored["teacher"], rows, strict=True)
        ]
        return {**scored, "teacher": teacher}

    @torch.no_grad()
    def _score_prior(self, groups: list[PromptGroup]) -> list[Tensor]:
        """[T, Ds] hidden states of every response without the image, from the prior's weights."""
        scorer, student, found = self.step_scorer, self._student, {}
        texts = [replace(group, prompt_ids=group.text_prompt_ids, images={}) for group in groups]
        wrapper = self.model_wrapped if scorer.sharded else student
        with self.prior.in_place(student), self.accelerator.autocast():
            for chosen in scorer.rollout_passes(texts, shared=scorer.sharded):
                part = select_responses(texts, chosen)
                task = partial(scorer.plain_rows, student, part)
                _, rows = run_inside(scorer.redirect, wrapper, student, task)
                found |= dict(zip(chosen, rows.split(response_lengths(part)), strict=True))
        return [found[index] for index in sorted(found)]
