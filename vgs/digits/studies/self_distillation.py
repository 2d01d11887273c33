"""`vgs study self-distillation`: what a model learns from itself where the teacher alone sees clean digits.

All arms start from the same model (`privileged.reader`) and, seed by seed, see the same faint and noisy pictures
for the same number of steps; they differ in the teacher's context and in the support of the divergence. The folder gets
`results.json` and `self_distillation.png`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...reports.statistics import interval
from ..short_runs import short_run, short_run_options, smooth
from ..workers import line, quiet, versions, workers

if TYPE_CHECKING:
    from ..privileged import ReaderRecipe

# The published support, the 256 likeliest of some 150,000 tokens, would be this task's whole vocabulary.
TOP_K = 16
ARMS: dict[str, dict[str, Any]] = {
    "clean digits": {"context": "clean"},
    "clean digits, top 16, clip 0.05": {
        "context": "clean",
        "full_vocabulary": False,
        "divergence": {"top_k": TOP_K},
    },
    "labels in words": {"context": "labels"},
    "Gaussian noise": {"context": "clean", "privileged_control": "noise"},
}
# name -> context and control: what the gap is measured with, for every model
GAPS = {"clean": ("clean", None), "labels": ("labels", None), "noise": ("clean", "noise")}


@dataclass(frozen=True)
class StudySettings:
    """Budget of the study; the learning rate was chosen on the validation split, with seed 0 of the first arm."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 48
    batch_size: int = 32
    learning_rate: float = 3e-4
    teacher: str = "ema"
    validate_every: int = 16
    validation_size: int = 160
    test_size: int = 600
    gap_size: int = 200
    workers: int = 2
    recipe: ReaderRecipe | None = None  # None: the task's own


def quick_study() -> StudySettings:
    """Seconds instead of minutes: everything runs, nothing is learned."""
    from ..demo import quick_settings
    from ..privileged import ReaderRecipe

    recipe = ReaderRecipe(quick_settings().recipes["teacher"], steps=2, batch_size=6)
    return StudySettings((0,), 2, 4, 1e-3, "ema", 1, 4, 8, 4, 1, recipe)


def run_study(
    out: Path, cache: Path | None = None, quick: bool = False, settings: StudySettings | None = None
) -> dict[str, Any]:
    """Runs the whole study and returns what `results.json` holds.

    Args:
        out: folder for `results.json` and `self_distillation.png`; made if missing.
        cache: folder for the trained model; None means `~/.cache/vgs`.
        quick: a budget of seconds, to see that everything runs.
        settings: another budget.
    """
    settings = settings or (quick_study() if quick else StudySettings())
    out, cache = Path(out), Path("~/.cache/vgs" if cache is None else cache).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with workers(settings.workers) as spread:
        spread(prepare, [(settings, cache)])
        jobs = [("before", 0), *((arm, seed) for seed in settings.seeds for arm in ARMS)]
        before, *runs = spread(distil, [(*job, settings, cache, out) for job in jobs])
    results: dict[str, Any] = {
        "settings": {**dataclasses.asdict(settings), "arms": ARMS},
        "versions": versions(),
        "before": before,
        "runs": runs,
        "summary": summarise(before, runs),
    }
    draw(out, results)
    results["seconds"] = time.perf_counter() - started
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\n{out / 'results.json'}, {out / 'self_distillation.png'}")
    return results


def prepare(settings: StudySettings, cache: Path) -> None:
    """Trains the model into the cache unless it is there."""
    from ..privileged import reader

    with quiet():
        reader(cache, recipe=settings.recipe, line=line())


def distil(arm: str, seed: int, settings: StudySettings, cache: Path, out: Path) -> dict[str, Any]:
    """One run: distils the model as `arm` says ("before": not at all) and assesses it on held-out pictures.

    Args:
        arm: of `ARMS`.
        seed: of the questions and the sampling.
        settings: the budget.
        cache: folder for trained models.
        out: folder of the study.
    """
    from ..grading import accuracy
    from ..privileged import questions, reader

    with quiet():
        model, processor = reader(cache, recipe=settings.recipe)
        run: dict[str, Any] = {"arm": arm, "seed": seed}
        if arm == "before":
            run["validation"] = accuracy(model, processor, questions("validation", settings.validation_size))["answers"]
        else:
            run |= train(model, processor, arm, seed, settings, out)
        start, _ = reader(cache, recipe=settings.recipe)
        return {**run, **assess(model, start, processor, seed, settings)}


def train(model: Any, processor: Any, arm: str, seed: int, settings: StudySettings, out: Path) -> dict[str, Any]:
    """Distils the model in place; returns the run's curves and seconds per step.

    Args:
        model, processor: of the task.
        arm, seed, settings, out: see `distil`.
    """
    from ...trainers.self_distillation import SelfDistillationConfig, SelfDistillationTrainer
    from ..pictures import scorer
    from ..privileged import build

    options = dict(ARMS[arm])
    context = options.pop("context")
    trainer = SelfDistillationTrainer(
        model=model,
        args=SelfDistillationConfig(
            **short_run_options(settings, out, arm, seed),
            teacher=settings.teacher,
            per_device_train_batch_size=settings.batch_size,
            **options,
        ),
        train_dataset=build("train", settings.steps * settings.batch_size, 100 + seed, context),
        eval_dataset=build("validation", settings.validation_size, 0, context),
        processing_class=processor,
        scorer=scorer,
    )
    return short_run(trainer, f"{arm}, seed {seed}", line(), ("divergence",), "eval_accuracy")


def assess(model: Any, start: Any, processor: Any, seed: int, settings: StudySettings) -> dict[str, Any]:
    """Accuracy on held-out pictures without and (on fewer) with context, and KL gaps on the model's own responses.

    Args:
        model: after the run.
        start: before it; a teacher that does not move, for the gap `to_start`.
        processor: of both.
        seed: of the responses.
        settings: sizes.
    """
    from ...evaluation.kl_gap import kl_gap, on_policy
    from ...evaluation.sampling import Sampling
    from ..grading import accuracy
    from ..privileged import CONTEXTS, questions

    found: dict[str, Any] = {"test": {"plain": accuracy(model, processor, questions("test", settings.test_size))}}
    for context in CONTEXTS:
        shown = questions("test", settings.gap_size, context=context, shown=True)
        found["test"][context] = accuracy(model, processor, shown)
    asked = [question.sample for question in questions("test", settings.gap_size)]
    sampling = Sampling(greedy=False, max_new_tokens=32)
    answers = on_policy(model, processor, asked, sampling, seed=seed, batch_size=128)
    for key, teacher in (("gap", model), ("to_start", start)):
        found[key] = {}
        for name, (context, control) in GAPS.items():
            samples = [question.sample for question in questions("test", settings.gap_size, context=context)]
            options = {"teacher": teacher, "control": control, "batch_size": 64}
            found[key][name] = kl_gap(model, processor, samples, answers, **options)["gap"]
    return found


def summarise(before: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For every arm, means over seeds with half the width of their 95 % t-intervals.

    Args:
        before: what `distil` returns for "before".
        runs: what it returns for all arms and seeds.

    Returns:
        Fractions, nats per token and seconds, each as (mean, half width).
    """
    found: dict[str, Any] = {}
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm]
        right = [run["test"]["plain"]["answers"] for run in own]
        found[arm] = {
            "answers": interval(right),
            "digits": interval([run["test"]["plain"]["digits"] for run in own]),
            "gain": interval([value - before["test"]["plain"]["answers"] for value in right]),
            "seconds_per_step": interval([run["seconds_per_step"] for run in own]),
            **{
                f"{key} {name}": interval([run[key][name] for run in own])
                for key in ("gap", "to_start")
                for name in GAPS
            },
        }
    return found


def draw(out: Path, results: Mapping[str, Any]) -> None:
    """Validation accuracy and divergence over the run, and the gap before and after."""
    from .plots import gap_study

    before, runs = results["before"], results["runs"]
    accuracy = {
        arm: [
            ([0, *run["validation"]["step"]], [before["validation"], *run["validation"]["accuracy"]])
            for run in runs
            if run["arm"] == arm
        ]
        for arm in ARMS
    }
    loss = {
        arm: [(run["curves"]["step"], smooth(run["curves"]["divergence"])) for run in runs if run["arm"] == arm]
        for arm in ARMS
    }
    summary = results["summary"]
    gaps = {arm: summary[arm]["to_start clean"] for arm in ARMS}
    gap_study(
        out / "self_distillation.png",
        {"right answers, validation": accuracy, "training divergence (nats per token)": loss},
        {"before": (before["to_start"]["clean"], math.nan), **gaps},
    )


def table(results: Mapping[str, Any]) -> str:
    """The summary as text, one row per arm."""

    def cell(pair: Sequence[float], factor: float = 1.0, digits: int = 3, unit: str = "") -> str:
        mean, half = (factor * value for value in pair)
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}") + unit

    before = results["before"]
    columns = ["gap clean", "gap labels", "gap noise", "to_start clean", "to_start labels"]
    rows = [["", "answers right", "digits right", "gain", *columns, "s/step"]]
    start = [f"{100 * before['test']['plain'][key]:.1f} %" for key in ("answers", "digits")]
    rows.append(["before", *start, "", *(f"{before[x.split()[0]][x.split()[1]]:.3f}" for x in columns), ""])
    for arm, found in results["summary"].items():
        cells = [cell(found[key], 100, 1, " %") for key in ("answers", "digits", "gain")]
        rows.append([arm, *cells, *(cell(found[key]) for key in columns), cell(found["seconds_per_step"], 1, 2)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in rows]
    settings, test = results["settings"], before["test"]
    note = (
        f"{settings['test_size']} questions about held-out, faint and noisy pictures, greedy answers; mean and 95 % "
        f"t-interval over {len(settings['seeds'])} seeds.\nBefore, with context, the first {settings['gap_size']}: "
        + ", ".join(f"{name} {100 * test[name]['answers']:.1f} % right" for name in test if name != "plain")
        + ".\ngap X: KL(model with context X || model without), to_start X: KL(initial model with X || model without), "
        "nats per token of sampled answers."
    )
    return "\n".join(["", *lines, "", note, f"{results['seconds']:.0f} s in total"])
