"""What the demo and the studies do alike: short runs with a progress bar, and their curves."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def short_run_options(
    settings: Any, out: Path, arm: str, seed: int, learning_rate: float | None = None
) -> dict[str, Any]:
    """Arguments of a trainer for minutes on a CPU, every step logged.

    Args:
        settings: a budget: steps, learning_rate, validation_size, validate_every.
        out: folder of all runs.
        arm, seed: of this one.
        learning_rate: of this one; None: the budget's.
    """
    return {
        "output_dir": str(out / "runs" / f"{arm}-{seed}"),
        "seed": seed,
        "max_steps": settings.steps,
        "per_device_eval_batch_size": settings.validation_size,
        "learning_rate": settings.learning_rate if learning_rate is None else learning_rate,
        "warmup_steps": min(5, settings.steps - 1),
        "max_completion_length": 32,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": settings.validate_every,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
    }


def short_run(trainer: Any, title: str, line: int, curves: Sequence[str], accuracy: str) -> dict[str, Any]:
    """Trains behind a progress bar; leaves the model in evaluation mode.

    Args:
        trainer: a trainer that logs every step.
        title: of the bar. line: on which it stands.
        curves: logged values of every step that are wanted, as far as the objective has them.
        accuracy: name of the validation's.

    Returns:
        ``seconds_per_step``, ``curves`` (with ``step``) and ``validation`` (``step``, ``accuracy``).
    """
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, TrainerCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar.update()

    trainer.add_callback(Progress())
    trainer.remove_callback(PrinterCallback)
    with tqdm(total=trainer.args.max_steps, desc=title, unit="step", position=line, mininterval=0.5) as bar:
        trainer.train()
    trainer.model.eval()
    steps = [entry for entry in trainer.state.log_history if "step_time" in entry]
    found = ("step", *(key for key in curves if all(key in entry for entry in steps)))
    checks = [entry for entry in trainer.state.log_history if accuracy in entry]
    return {
        "seconds_per_step": statistics.median(entry["step_time"] for entry in steps),
        "curves": {key: [entry[key] for entry in steps] for key in found},
        "validation": {
            "step": [entry["step"] for entry in checks],
            "accuracy": [entry[accuracy] for entry in checks],
        },
    }


def smooth(values: Sequence[float], window: int = 5) -> list[float]:
    """Trailing mean, for curves of single batches."""
    return [statistics.fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
