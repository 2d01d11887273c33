"""How many optimizer steps a run will take, and what of the data they leave out: known before any model is loaded."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Steps:
    """Steps of a run.

    Attributes:
        prompts: distinct prompts of one sampled batch, over all processes.
        batches: sampled batches of an epoch. left_over: rows that every epoch leaves out, others each time.
        total: optimizer steps of the run.
    """

    prompts: int
    batches: int
    left_over: int
    total: int


def processes() -> int:
    """How many processes the launcher has started."""
    return max(int(os.environ.get("WORLD_SIZE", "1") or 1), 1)


def plan_steps(rows: int, args: Any, ranks: int) -> Steps:
    """Steps of a run over so many rows.

    Args:
        rows: of the training data.
        args: the trainer's settings.
        ranks: processes.

    Raises:
        ConfigError: fewer rows than one batch takes, or no optimizer step.
    """
    accumulation, generations = args.gradient_accumulation_steps, args.num_generations
    micro = getattr(args, "steps_per_generation", None) or accumulation  # of one sampled batch
    responses = args.per_device_train_batch_size * micro * ranks
    prompts = responses // generations
    batches, left_over = divmod(rows, max(prompts, 1))
    if batches == 0:
        product = f"per_device_train_batch_size {args.per_device_train_batch_size} * {micro} accumulation steps"
        product += f" * {ranks} processes" if ranks > 1 else ""
        product += f" / num_generations {generations}" if generations > 1 else ""
        raise ConfigError(
            f"data.train has {rows} row{'s' if rows != 1 else ''}, fewer than the {prompts} prompts of one batch "
            f"({product}): no step would be taken. Use a smaller batch or more rows."
        )
    per_epoch = batches * micro * getattr(args, "num_iterations", 1) // accumulation
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    if args.max_steps == 0 or total <= 0:
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise ConfigError(f"{name} must give at least one optimizer step, got {getattr(args, name)}.")
    return Steps(prompts, batches, left_over, total)


def say_steps(steps: Steps, rows: int) -> None:
    """One line in the log about rows that no epoch can use, if there are any."""
    if steps.left_over:
        logger.warning(
            "%d of %d training rows are left out of every epoch (others each time): a batch takes %d prompts.",
            *(steps.left_over, rows, steps.prompts),
        )
