"""`vgs demo`: plain distillation against Visual Gradient Steering on handwritten digits, in minutes and without a GPU.

Teacher and student are trained once and cached. Every seed then distils a copy of the student twice, plainly and with
VGS, on the same questions for the same number of steps. The folder gets `results.json` and two pictures.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reports.statistics import interval
from .short_runs import short_run, short_run_options, smooth
from .workers import line, quiet, versions, workers

if TYPE_CHECKING:
    from .pictures import Example
    from .pretraining import Recipe

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"gamma": 0.0, "lam": 0.0, "eta": 1.0},
    "VGS": {"gamma": 2.0, "lam": 0.01, "eta": "measure", "prior": "frozen"},
}
TERMS = ("standard", "visual", "language", "vds", "student_vds")
CURVES = {
    "eval_accuracy": "right answers, validation",
    "standard": "standard: KL(p_I || q_I)",
    "visual": "visual: KL(p_I || q*)",
    "language": "language: KL(p_x || q_x)",
    "vds": "visual dependency: KL(q_I || q_x)",
    "student_vds": "student's dependency: KL(p_I || p_x)",
}


@dataclass(frozen=True)
class DemoSettings:
    """Budget of a demo; the learning rate is what the study chose for both arms, on the validation split."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 64
    batch_size: int = 32
    learning_rate: float = 1e-3
    validate_every: int = 16
    validation_size: int = 160
    test_size: int = 600
    shown: int = 6
    workers: int = 2  # processes of one thread each, so that numbers do not depend on the number of cores
    recipes: Mapping[str, Recipe] | None = None  # None: `demo_recipes`


def demo_recipes() -> dict[str, Recipe]:
    """The student of `vgs study steering` that fits the paper's premise, its language mature and its vision neither
    mature nor blind, and its teacher."""
    from .pretraining import noisy_recipes

    found = noisy_recipes()
    return {"teacher": found["teacher"], "student": found["fair"]}


def quick_settings() -> DemoSettings:
    """Seconds instead of minutes: everything runs, nothing is learned."""
    from .models import Shape
    from .pictures import Habits
    from .pretraining import Phase, Recipe

    shape = Shape(layers=1, width=32, heads=2, vision_layers=1)
    recipes = {
        role: Recipe(shape, (Phase(steps=steps, batch_size=8),), Habits())
        for role, steps in (("teacher", 4), ("student", 2))
    }
    return DemoSettings((0,), 2, 4, 1e-3, 1, 4, 8, 2, 1, recipes)


def run_demo(out: Path, cache: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Runs the whole demo and returns what `results.json` holds.

    Args:
        out: folder for `results.json`, `learning_curves.png` and `answers.png`; made if missing.
        cache: folder for the trained teacher and student; None means `~/.cache/vgs`.
        quick: a budget of seconds, to see that everything runs.
    """
    settings = quick_settings() if quick else DemoSettings()
    out, cache = Path(out), Path("~/.cache/vgs" if cache is None else cache).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with workers(settings.workers) as spread:  # they import the libraries; this process never needs to
        recipes = dict(spread(prepare, [(role, settings, cache, demo_recipes) for role in ("teacher", "student")]))
        prepared = time.perf_counter() - started
        jobs = [("before", 0), *((arm, seed) for seed in settings.seeds for arm in ARMS)]
        before, *runs = spread(distil, [(*job, settings, cache, out) for job in jobs])
    results: dict[str, Any] = {
        "settings": {**dataclasses.asdict(settings), "recipes": recipes, "arms": ARMS},
        "versions": versions(),
        "teacher": before.pop("teacher"),
        "before": before,
        "runs": runs,
    }
    draw(out, results, settings)
    results["questions"] = asked(settings.shown, recipes["teacher"]["noise"])
    results["seconds"] = {"models": prepared, "total": time.perf_counter() - started}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(f"\n{out / 'results.json'}, {out / 'learning_curves.png'}, {out / 'answers.png'}")
    return results


def prepare(
    role: str, settings: Any, cache: Path, recipes: Callable[[], Mapping[str, Recipe]]
) -> tuple[str, dict[str, Any]]:
    """Trains a model into the cache unless it is there; returns its role and recipe.

    Args:
        role: "teacher" or "student".
        settings: a budget with `recipes`.
        cache: folder for trained models.
        recipes: gives those of a budget that has none.
    """
    from .pretraining import pretrained

    recipe = (settings.recipes or recipes())[role]
    with quiet():
        pretrained(role, cache, recipe=recipe, line=line())
    return role, dataclasses.asdict(recipe)


def distil(arm: str, seed: int, settings: DemoSettings, cache: Path, out: Path) -> dict[str, Any]:
    """One run: distils the student as `arm` says ("before": not at all) and assesses it on held-out pictures.

    Args:
        arm: of `ARMS`.
        seed: of the questions and the sampling.
        settings: the budget.
        cache: folder for trained models.
        out: folder of the demo.

    Returns:
        `arm`, `seed`, and what `train` and `assess` return; of "before" the accuracies of student and teacher instead
        of a training.
    """
    from .grading import accuracy
    from .pictures import take
    from .pretraining import pretrained

    recipes = settings.recipes or demo_recipes()
    with quiet():
        teacher, processor = pretrained("teacher", cache, recipe=recipes["teacher"])
        student, _ = pretrained("student", cache, recipe=recipes["student"])
        noise = recipes["teacher"].noise
        test = take("test", settings.test_size, seed=0, noise=noise)
        if arm == "before":
            validation = take("validation", settings.validation_size, seed=0, noise=noise)
            run = {
                "validation": accuracy(student, processor, validation)["answers"],
                "teacher": accuracy(teacher, processor, test),
            }
        else:
            run = {"arm": arm, "seed": seed, **train(student, teacher, processor, arm, seed, settings, out, noise)}
        return {**run, **assess(student, teacher, processor, test, settings.shown)}


def train(
    student: Any, teacher: Any, processor: Any, arm: str, seed: int, settings: DemoSettings, out: Path, noise: float
) -> dict[str, Any]:
    """Distils the student in place; returns what `distillation` returns.

    Args:
        student, teacher, processor: of the task.
        arm, seed, settings, out: see `distil`.
        noise: of the pictures.
    """
    options = short_run_options(settings, out, arm, seed) | ARMS[arm]
    return distillation(student, teacher, processor, options, settings, seed, f"{arm}, seed {seed}", noise=noise)


def distillation(
    student: Any,
    teacher: Any,
    processor: Any,
    options: Mapping[str, Any],
    settings: Any,
    seed: int,
    title: str,
    **pictures: Any,
) -> dict[str, Any]:
    """Distils a student in place; returns the run's eta and what `short_runs.short_run` returns.

    Args:
        student, teacher, processor: of the task.
        options: of the trainer.
        settings: a budget: steps, batch_size, validation_size.
        seed: of the questions.
        title: of the progress bar.
        **pictures: how they are drawn, see `task.build`.
    """
    from ..trainers.distillation import VGSTrainer
    from ..trainers.settings import VGSConfig
    from .task import build, scorer

    trainer = VGSTrainer(
        model=student,
        teacher_model=teacher,
        args=VGSConfig(
            per_device_train_batch_size=settings.batch_size,
            lr_scheduler_type="linear",
            **options,
        ),
        train_dataset=build("train", settings.steps * settings.batch_size, seed=100 + seed, **pictures),
        eval_dataset=build("validation", settings.validation_size, seed=0, **pictures),
        processing_class=processor,
        scorer=scorer,
    )
    run = short_run(trainer, title, line(), TERMS, "eval_accuracy")
    eta = next(entry["eta"] for entry in reversed(trainer.state.log_history) if "eta" in entry)
    return {"eta": eta, **run}


def assess(model: Any, teacher: Any, processor: Any, questions: Sequence[Example], shown: int) -> dict[str, Any]:
    """Accuracy of greedy answers, the mean of every term over their tokens, and the first `shown` answers.

    Args:
        model, teacher, processor: of the task.
        questions: held-out ones.
        shown: how many answers are kept word by word.

    Returns:
        `test` as of `grading.grade`, `terms` (nats per token) and `answers` (words, their `vds` in nats, `right`).
    """
    from vgs_kernels import VGSObjective

    from ..evaluation.token_terms import score_responses
    from .grading import grade, greedy_answers
    from .pictures import scorer

    answers = greedy_answers(model, processor, questions)
    records = [example.record() for example in questions]
    tokens = score_responses(model, teacher, processor, records, answers, VGSObjective())
    terms = {term: sum(row[term].sum().item() for row in tokens) / sum(map(len, answers)) for term in TERMS}
    spoken = []
    for example, ids, row in zip(questions[:shown], answers, tokens, strict=False):
        words = processor.decode(ids, skip_special_tokens=True).split()
        values = [round(value, 4) for value in row["vds"].tolist()[: len(words)]]
        spoken.append({"words": words, "vds": values, "right": scorer(" ".join(words), example.answer)})
    return {"test": grade(processor, questions, answers), "terms": terms, "answers": spoken}


def draw(out: Path, results: dict[str, Any], settings: DemoSettings) -> None:
    """The two pictures: learning curves, and answers coloured by the teacher's visual dependency score.

    Args:
        out: folder that gets them.
        results: of the demo.
        settings: its budget.
    """
    from .pictures import take
    from .plots import AnswerSheet, ColouredAnswer, answer_sheets, learning_curves

    def curve(run: dict[str, Any], key: str) -> tuple[list[float], list[float]]:
        if key == "eval_accuracy":
            return [0, *run["validation"]["step"]], [results["before"]["validation"], *run["validation"]["accuracy"]]
        return run["curves"]["step"], smooth(run["curves"][key])

    runs = {arm: [run for run in results["runs"] if run["arm"] == arm] for arm in ARMS}
    panels = {name: {arm: [curve(run, key) for run in runs[arm]] for arm in ARMS} for key, name in CURVES.items()}
    spread = "mean and range over seeds" if len(settings.seeds) > 1 else "one seed"
    title = f"Distillation on handwritten digits, {spread} (terms in nats per token)"
    learning_curves(out / "learning_curves.png", panels, title)

    noise = results["settings"]["recipes"]["teacher"]["noise"]
    speakers = {"before": results["before"], **{arm: runs[arm][0] for arm in ARMS}}
    sheets = [
        AnswerSheet(
            example.image,
            example.question,
            example.answer,
            [
                ColouredAnswer(name, run["answers"][i]["words"], run["answers"][i]["vds"], run["answers"][i]["right"])
                for name, run in speakers.items()
            ],
        )
        for i, example in enumerate(take("test", settings.shown, seed=0, noise=noise))
    ]
    title = "Held-out pictures, answers before and after distillation"
    answer_sheets(out / "answers.png", sheets, title, "visual dependency of a word (nats)")


def asked(count: int, noise: float) -> list[dict[str, Any]]:
    """The questions whose answers are kept word by word, with their pictures as data URIs, for `vgs report`.

    Args:
        count: how many.
        noise: of the pictures.
    """
    import base64
    import io

    from .pictures import take

    questions = []
    for example in take("test", count, seed=0, noise=noise):
        content = io.BytesIO()
        example.image.save(content, format="PNG")
        picture = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
        questions.append({"question": example.question, "answer": example.answer, "images": [picture]})
    return questions


def table(results: dict[str, Any]) -> str:
    """The summary as text: one row per arm, mean and standard deviation over seeds."""
    arms: dict[str, list[dict[str, Any]]] = {"before": [results["before"]]}
    for run in results["runs"]:
        arms.setdefault(run["arm"], []).append(run)

    def cell(values: Sequence[float], digits: int) -> str:
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    head = ["", "answers right", "digits right", *TERMS, "eta", "s/step"]
    rows = [head]
    for arm, entries in arms.items():
        row = [arm, *(cell([100 * entry["test"][key] for entry in entries], 1) + " %" for key in ("answers", "digits"))]
        row += [cell([entry["terms"][term] for entry in entries], 3) for term in TERMS]
        row += [
            cell([entry[key] for entry in entries], 2) if arm != "before" else "" for key in ("eta", "seconds_per_step")
        ]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True)) for row in rows]
    differences = [
        f"{arm} - plain: {difference(entries, arms['plain'])} points of answers right (± half a 95 % interval)"
        for arm, entries in arms.items()
        if arm not in ("before", "plain")
    ]
    teacher, questions = results["teacher"], results["settings"]["test_size"]
    note = f"{questions} questions about held-out pictures, {len(results['settings']['seeds'])} seeds"
    note += f"; the teacher answers {100 * teacher['answers']:.1f} % right; terms in nats per token of greedy answers"
    return "\n".join(["", *lines, "", *differences, note, f"{results['seconds']['total']:.0f} s in total"])


def difference(runs: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> str:
    """The mean difference in answers right, in points, ± half its 95 % t-interval over seeds.

    Args:
        runs, plain: of the same seeds, in the same order.
    """
    pairs = zip(runs, plain, strict=True)
    found = [100 * (run["test"]["answers"] - other["test"]["answers"]) for run, other in pairs]
    mean, half = interval(found)
    return f"{mean:+.1f}" if len(found) < 2 else f"{mean:+.1f} ± {half:.1f}"
