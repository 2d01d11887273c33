"""`vgs study grpo`: reinforcement learning alone, with plain distillation and with VGS, on handwritten digits.

All arms start from the same student and, seed by seed, see the same questions in as many rollouts and steps; the reward
is the right answer. The folder gets `results.json` and `grpo.png`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...reports.statistics import interval
from ..demo import prepare, quick_settings
from ..short_runs import short_run, short_run_options, smooth
from ..workers import line, quiet, versions, workers

if TYPE_CHECKING:
    from ..pretraining import Recipe

# alpha: weight of the distillation, 1 - alpha that of the policy gradient (arXiv 2606.00564, Eq. 22)
ARMS: dict[str, dict[str, Any]] = {
    "GRPO": {"alpha": 0.0},
    "GRPO + plain": {"alpha": 0.3, "gamma": 0.0, "lam": 0.0},
    "GRPO + VGS": {"alpha": 0.3, "gamma": 2.0, "lam": 0.01},
}
CURVES = {"reward": "reward of the rollouts", "accuracy": "right answers, validation", "entropy": "entropy (nats)"}


@dataclass(frozen=True)
class StudySettings:
    """Budget of the study; the learning rate was chosen on the validation split, for all arms alike."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 32
    prompts: int = 32  # with fewer rollouts a step, the reward alone teaches nothing in this time
    generations: int = 8
    learning_rate: float = 5e-4
    validate_every: int = 8
    validation_size: int = 160
    test_size: int = 600
    workers: int = 2
    recipes: Mapping[str, Recipe] | None = None  # None: the task's own


def quick_study() -> StudySettings:
    """Seconds instead of minutes: everything runs, nothing is learned."""
    return StudySettings((0,), 2, 2, 2, 1e-3, 1, 4, 8, 1, quick_settings().recipes)


def task_recipes() -> Mapping[str, Recipe]:
    """The task's own teacher and student."""
    from ..pretraining import RECIPES

    return RECIPES


def run_study(
    out: Path, cache: Path | None = None, quick: bool = False, settings: StudySettings | None = None
) -> dict[str, Any]:
    """Runs the whole study and returns what `results.json` holds.

    Args:
        out: folder for `results.json` and `grpo.png`; made if missing.
        cache: folder for the trained teacher and student; None means `~/.cache/vgs`.
        quick: a budget of seconds, to see that everything runs.
        settings: another budget.
    """
    settings = settings or (quick_study() if quick else StudySettings())
    out, cache = Path(out), Path("~/.cache/vgs" if cache is None else cache).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with workers(settings.workers) as spread:
        recipes = dict(spread(prepare, [(role, settings, cache, task_recipes) for role in ("teacher", "student")]))
        jobs = [(arm, seed) for seed in settings.seeds for arm in ARMS]
        before, *runs = spread(improve, [(*job, settings, cache, out) for job in [("before", 0), *jobs]])
    results: dict[str, Any] = {
        "settings": {**dataclasses.asdict(settings), "recipes": recipes, "arms": ARMS},
        "versions": versions(),
        "before": before,
        "runs": runs,
        "summary": summarise(runs),
    }
    draw(out, results, settings)
    results["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\n{out / 'results.json'}, {out / 'grpo.png'}")
    return results


def improve(arm: str, seed: int, settings: StudySettings, cache: Path, out: Path) -> dict[str, Any]:
    """One run: trains the student as `arm` says ("before": not at all); greedy accuracy on held-out pictures.

    Args:
        arm: of `ARMS`.
        seed: of the questions and the sampling.
        settings: the budget.
        cache: folder for trained models.
        out: folder of the study.
    """
    from ..grading import accuracy
    from ..pictures import take
    from ..pretraining import pretrained

    recipes = settings.recipes or task_recipes()
    with quiet():
        student, processor = pretrained("student", cache, recipe=recipes["student"])
        teacher, _ = pretrained("teacher", cache, recipe=recipes["teacher"])
        test = take("test", settings.test_size, seed=0)
        if arm == "before":
            validation = take("validation", settings.validation_size, seed=0)
            run: dict[str, Any] = {
                "validation": accuracy(student, processor, validation)["answers"],
                "teacher": accuracy(teacher, processor, test),
            }
        else:
            run = {"arm": arm, "seed": seed, **train(student, teacher, processor, arm, seed, settings, out)}
        return {**run, "test": accuracy(student, processor, test)}


def train(
    student: Any, teacher: Any, processor: Any, arm: str, seed: int, settings: StudySettings, out: Path
) -> dict[str, Any]:
    """Trains the student in place; returns the run's curves and seconds per step.

    Args:
        student, teacher, processor: of the task.
        arm, seed, settings, out: see `improve`.
    """
    from ...trainers.grpo import VGSGRPOConfig, VGSGRPOTrainer
    from ..task import build, scorer

    trainer = VGSGRPOTrainer(
        model=student,
        teacher_model=None if ARMS[arm]["alpha"] == 0 else teacher,
        args=VGSGRPOConfig(
            **short_run_options(settings, out, arm, seed),
            per_device_train_batch_size=settings.prompts * settings.generations,
            num_generations=settings.generations,
            lr_scheduler_type="linear",
            loss_type="grpo",
            **ARMS[arm],
        ),
        train_dataset=build("train", settings.steps * settings.prompts, seed=100 + seed),
        eval_dataset=build("validation", settings.validation_size, seed=0),
        processing_class=processor,
        scorer=scorer,
    )
    return short_run(trainer, f"{arm}, seed {seed}", line(), ("reward", "entropy"), "eval_reward")


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """For every arm, means over seeds with 95 % t-intervals: held-out accuracy, its gain on GRPO seed by seed."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    right = {(run["arm"], run["seed"]): run["test"] for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    for arm in ARMS:
        gains = [right[arm, seed]["answers"] - right["GRPO", seed]["answers"] for seed in seeds]
        found[arm] = {
            "answers": interval([right[arm, seed]["answers"] for seed in seeds]),
            "digits": interval([right[arm, seed]["digits"] for seed in seeds]),
            "gain": interval(gains),
            "reward": interval([statistics.fmean(run["curves"]["reward"][-10:]) for run in runs if run["arm"] == arm]),
            "seconds_per_step": interval([run["seconds_per_step"] for run in runs if run["arm"] == arm]),
        }
    return found


def draw(out: Path, results: Mapping[str, Any], settings: StudySettings) -> None:
    """Learning curves of reward, validation accuracy and entropy."""
    from ..plots import learning_curves

    def curve(run: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
        if key == "accuracy":
            return [0, *run["validation"]["step"]], [results["before"]["validation"], *run["validation"]["accuracy"]]
        return run["curves"]["step"], smooth(run["curves"][key])

    panels = {
        name: {arm: [curve(run, key) for run in results["runs"] if run["arm"] == arm] for arm in ARMS}
        for key, name in CURVES.items()
    }
    spread = "mean and range over seeds" if len(settings.seeds) > 1 else "one seed"
    learning_curves(out / "grpo.png", panels, f"Reinforcement learning on handwritten digits, {spread}")


def table(results: Mapping[str, Any]) -> str:
    """The summary as text, one row per arm."""

    def cell(pair: Sequence[float], percent: bool = True) -> str:
        mean, half = [100 * value for value in pair] if percent else pair
        width = "" if math.isnan(half) else f" ± {half:.{1 if percent else 2}f}"
        return f"{mean:.1f}{width} %" if percent else f"{mean:.2f}{width}"

    before = results["before"]
    rows = [
        ["", "answers right", "digits right", "gain on GRPO", "reward, last 10", "s/step"],
        ["before", *(f"{100 * before['test'][key]:.1f} %" for key in ("answers", "digits")), "", "", ""],
    ]
    for arm, found in results["summary"].items():
        cells = [cell(found[key]) for key in ("answers", "digits", "gain", "reward")]
        rows.append([arm, *cells, cell(found["seconds_per_step"], percent=False)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in rows]
    settings = results["settings"]
    note = f"{settings['test_size']} questions about held-out pictures, greedy answers; mean and 95 % t-interval over "
    note += f"{len(settings['seeds'])} seeds; the teacher answers {100 * before['teacher']['answers']:.1f} % right"
    return "\n".join(["", *lines, "", note, f"{results['seconds']:.0f} s in total"])
