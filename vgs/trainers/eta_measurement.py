"""eta in a run: when it is measured, on what, and what is kept of it (arXiv 2606.00564, Eq. 15)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vgs_kernels import VGSObjective

from ..models.wrappers import run_inside
from ..objectives.eta import eta_at, gradient_norm, ratio_from, sharded_gradient_norm
from .micro_batch import MicroBatch

#: Weight of what was known before, in the running mean of a measured ratio: every step, or every so manieth.
CHEAP_DECAY, TRACKED_DECAY = 0.9, 0.7
LEAST_SHARE = 0.25  # of gamma, below which the gradients at the hidden states tell little of the whole of it


def is_due(trainer: Any) -> bool:
    """Whether this optimizer step's parameter gradients are measured."""
    args, steering = trainer.args, trainer.steering
    if args.fixed_eta is not None:
        return False
    if args.eta == "measure":
        return len(steering.ratios) < args.eta_batches
    if args.eta == "exact":
        return trainer.objective.gamma > 0
    return args.eta_every is not None and trainer.state.global_step % args.eta_every == 0


def measure(trainer: Any, micro_batches: Sequence[dict[str, Any]]) -> None:
    """Measure on all micro-batches of an optimizer step, with its weights before the step. Collective.

    ``exact`` takes gamma as it is in force, others take it as it is set.

    Args:
        trainer: a ``VGSTrainer``.
        micro_batches: of ``next_micro_batch``.

    Raises:
        ConfigError: there is no ratio, and none from before.
    """
    args, steering, whole = trainer.args, trainer.steering, trainer.args.objective(1.0).gamma
    gamma = trainer.objective.gamma if args.eta == "exact" else whole
    norms = gradient_norms(trainer, micro_batches, gamma)
    if args.eta == "measure":
        steering.add_ratio(*norms)
        return
    if not all(0 < norm < math.inf for norm in norms) and steering.ratio is not None:
        return  # a step without any token, say
    eta = steering.quotient(*norms)
    ratio, share, before = ratio_from(eta, gamma / whole), trainer.objective.gamma / whole, steering.ratio
    if args.eta != "exact":
        trainer.open_metrics["eta_exact"].append(eta_at(ratio, share))
        if before is not None:
            trainer.open_metrics["eta_error"].append(eta_at(before, share) / eta_at(ratio, share) - 1)
    if args.eta != "cheap":
        steering.keep_ratio(ratio, TRACKED_DECAY if args.eta == "tracked" else 0.0)


def gradient_norms(trainer: Any, micro_batches: Sequence[dict[str, Any]], gamma: float) -> tuple[float, float]:
    """Norms over all trainable parameters of the gradients of standard, and of standard + gamma * visual.

    Args:
        trainer, micro_batches: as of ``measure``. gamma: of the second.
    """
    scorer, student = trainer.step_scorer, trainer.student
    parameters = [p for p in student.parameters() if p.requires_grad]
    steered = replace(trainer.args.objective(1.0), gamma=gamma, lam=0.0)

    def losses(objective: VGSObjective) -> Iterator[Tensor]:
        for inputs in micro_batches:
            batch = trainer.plan_passes(inputs, inputs["num_items_in_batch"], objective, terms=False)
            for chosen in batch.passes:
                task = partial(scorer.pass_loss, student, batch, chosen)
                yield (run_inside(trainer.model_wrapped, task) if scorer.sharded else task())[0]

    def norm(objective: VGSObjective) -> float:
        if scorer.sharded:
            student.set_requires_gradient_sync(True)  # the host defers it in all micro-batches but the last
            try:
                return sharded_gradient_norm(losses(objective), parameters)
            finally:
                student.set_requires_gradient_sync(trainer.accelerator.sync_gradients)
        return gradient_norm(losses(objective), parameters, lambda x: trainer.accelerator.reduce(x, reduction="mean"))

    return norm(replace(steered, gamma=0.0)), norm(steered)


def note_norms(trainer: Any, batch: MicroBatch) -> None:
    """Take in the gradients at a micro-batch's last hidden states; those of a whole optimizer step make a ratio.

    Args:
        trainer: a ``VGSTrainer``. batch: whose passes have run.
    """
    sums = trainer.accelerator.reduce(torch.stack(batch.norms).sum(dim=0).float(), reduction="sum").tolist()
    steering, share = trainer.steering, batch.objective.gamma / trainer.args.gamma
    found = steering.add_norms(sums, trainer.current_gradient_accumulation_steps)
    if found is not None and share >= LEAST_SHARE:
        steering.keep_ratio(ratio_from(found, share), CHEAP_DECAY)
