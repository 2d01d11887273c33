"""`vgs study steering`: where visual steering helps, where it collapses, and what each of its parts does, on digits.

Three students with the same language and vision of three maturities learn from one teacher, plainly and steered. Every
run is a cell with a file of its own, so that a study that was stopped goes on where it was. Learning rates are chosen
for each student and arm on validation pictures; all arms see the same questions in as many rollouts and steps. The
folder gets `results.json`, `phase_diagram.png` and `bins.png`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...disk import write_whole
from ...errors import ConfigError
from ..demo import TERMS, distillation
from ..short_runs import short_run_options
from ..workers import line, quiet, versions, workers
from . import steering_summary

if TYPE_CHECKING:
    from ..pretraining import Recipe

PLAIN = {"gamma": 0.0, "lam": 0.0, "eta": 1.0}
STEERED = {"gamma": 2.0, "lam": 0.01, "eta": "measure", "gamma_guard": False}
#: Arms that every student is trained with: what the phase diagram shows.
ARMS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "gamma 1": {**STEERED, "gamma": 1.0},
    "gamma 2": STEERED,
    "gamma 2, guarded": {**STEERED, "gamma_guard": True},
    "gamma 2, frozen prior": {**STEERED, "prior": "frozen"},
}
#: Arms that change one part of "gamma 2", of the middle student alone and at its learning rate.
PARTS: dict[str, dict[str, Any]] = {
    "gamma 0.5": {**STEERED, "gamma": 0.5},
    "lam 0": {**STEERED, "lam": 0.0},
    "lam 1": {**STEERED, "lam": 1.0},
    "eta 1": {**STEERED, "eta": 1.0},
    "every token gated": {**STEERED, "lam": 1.0, "vds_quantile": 0.0},
    "prior with gradient": {**STEERED, "detach_prior": False},
    "quantile of a trajectory": {**STEERED, "vds_scope": "trajectory"},
    "language steering": {**STEERED, "preset": "language_steering"},
    "adaptive gamma": {**STEERED, "preset": "vgs_adaptive"},
}
SUPERVISED, BEFORE = "supervised", "before"
BINS = 10


@dataclass(frozen=True)
class StudySettings:
    """Budget of the study: at most two hours on two cores. ``part_seeds`` are those of ``PARTS`` and of supervised
    training."""

    seeds: tuple[int, ...] = tuple(range(8))
    part_seeds: tuple[int, ...] = tuple(range(4))
    steps: int = 64
    batch_size: int = 32
    rates: tuple[float, ...] = (3e-4, 1e-3, 2e-3)
    tuning_seed: int = 50
    validate_every: int = 32
    validation_size: int = 200
    test_size: int = 600
    workers: int = 2
    arms: tuple[str, ...] = tuple(ARMS)
    parts: tuple[str, ...] = tuple(PARTS)
    recipes: Mapping[str, Recipe] | None = None  # None: `pretraining.noisy_recipes`


@dataclass(frozen=True)
class Cell:
    """One run: a student, how it is trained, the learning rate, and the seed of its questions and sampling."""

    student: str
    arm: str
    rate: float = 0.0
    seed: int = 0

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join([self.student, self.arm.replace(" ", "_"), f"{self.rate:g}", str(self.seed)])


def quick_study() -> StudySettings:
    """Seconds instead of minutes: everything runs, nothing is learned."""
    from ..demo import quick_settings

    tiny = quick_settings().recipes
    models = {"teacher": tiny["teacher"], "weak": tiny["student"]}
    return StudySettings(
        (0,), (0,), 2, 4, (1e-3,), 50, 1, 4, 8, 1, ("plain", "gamma 2"), ("language steering",), models
    )


def run_study(
    out: Path, cache: Path | None = None, quick: bool = False, settings: StudySettings | None = None
) -> dict[str, Any]:
    """Runs what is missing of the study and returns what `results.json` holds.

    Args:
        out: folder for `results.json`, two pictures and the cells; made if missing. One of a study that was stopped
            goes on.
        cache: folder for the trained models; None means `~/.cache/vgs`.
        quick: a budget of seconds, to see that everything runs.
        settings: another budget.

    Raises:
        ConfigError: `out` has cells of other settings or versions.
    """
    settings = settings or (quick_study() if quick else StudySettings())
    if settings.recipes is None:
        from ..pretraining import noisy_recipes

        settings = dataclasses.replace(settings, recipes=noisy_recipes())
    out, cache = Path(out), Path("~/.cache/vgs" if cache is None else cache).expanduser()
    claim(out, settings)
    started = time.perf_counter()
    students = [role for role in settings.recipes if role != "teacher"]
    middle = students[len(students) // 2]
    with workers(settings.workers) as spread:

        def run(cells: Sequence[Cell]) -> list[dict[str, Any]]:
            return spread(cell_of, [(cell, settings, cache, out) for cell in cells])

        spread(prepare, [(role, settings, cache) for role in settings.recipes])
        before = run([Cell(student, BEFORE) for student in students])
        trials = [
            Cell(student, arm, rate, settings.tuning_seed)
            for student in students
            for arm in (SUPERVISED, *settings.arms)
            for rate in settings.rates
        ]
        rates = steering_summary.best_rates(run(trials))
        arms = [(student, arm, rates[student, arm]) for student in students for arm in settings.arms]
        parts = [(student, SUPERVISED, rates[student, SUPERVISED]) for student in students]
        parts += [(middle, arm, rates[middle, "gamma 2"]) for arm in settings.parts]
        asked = {seed: arms + (parts if seed in settings.part_seeds else []) for seed in settings.seeds}
        runs = run([Cell(*arm, seed) for seed, chosen in asked.items() for arm in chosen])
    results: dict[str, Any] = {
        "settings": {**dataclasses.asdict(settings), "arms": {**ARMS, **PARTS}},
        "versions": versions(),
        "middle": middle,
        "before": before,
        "runs": runs,
        "rates": [{"student": student, "arm": arm, "rate": rate} for (student, arm), rate in rates.items()],
        "summary": steering_summary.summarise(before, runs),
        "seconds": time.perf_counter() - started,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    steering_summary.draw(out, results, settings.arms)
    print(steering_summary.table(results))
    print(f"\n{out / 'results.json'}, {out / 'phase_diagram.png'}, {out / 'bins.png'}")
    return results


def claim(out: Path, settings: StudySettings) -> None:
    """Make the folder this study's, or see that it is.

    Raises:
        ConfigError: its cells are of other settings or versions.
    """
    # Seeds may be added later; where a run is computed changes nothing.
    facts = dataclasses.asdict(dataclasses.replace(settings, seeds=(), part_seeds=(), workers=1))
    text = json.dumps([facts, ARMS, PARTS, versions()], sort_keys=True)
    mark, digest = out / "cells" / "settings", hashlib.sha256(text.encode()).hexdigest()
    mark.parent.mkdir(parents=True, exist_ok=True)
    if mark.exists() and mark.read_text().strip() != digest:
        raise ConfigError(f"--out {out} has cells of other settings or versions: choose another folder.")
    mark.write_text(digest + "\n")


def prepare(role: str, settings: StudySettings, cache: Path) -> None:
    """Trains a model into the cache unless it is there."""
    with quiet():
        model(role, settings, cache, line())


def model(role: str, settings: StudySettings, cache: Path, place: int = 0) -> tuple[Any, Any]:
    """A model of the study with its processor."""
    from ..pretraining import pretrained

    kind = "teacher" if role == "teacher" else "student"
    return pretrained(kind, cache, recipe=settings.recipes[role], line=place)


def cell_of(cell: Cell, settings: StudySettings, cache: Path, out: Path) -> dict[str, Any]:
    """What came of a cell: from its file, or of a run now."""
    path = out / "cells" / f"{cell.name}.json"
    if path.exists():
        return json.loads(path.read_text())
    with quiet():
        found = {**dataclasses.asdict(cell), **compute(cell, settings, cache, out)}
    write_whole(path, (json.dumps(found) + "\n").encode())
    return found


def compute(cell: Cell, settings: StudySettings, cache: Path, out: Path) -> dict[str, Any]:
    """One run; of the `BEFORE` cell of a student, no training.

    Returns:
        What `train` and `assess` return, and `validation_end`, the accuracy on validation pictures after it.
    """
    from ..grading import accuracy
    from ..pictures import take

    teacher, processor = model("teacher", settings, cache)
    student, _ = model(cell.student, settings, cache)
    noise = settings.recipes["teacher"].noise
    validation = take("validation", settings.validation_size, seed=0, noise=noise)
    run: dict[str, Any] = {}
    if cell.arm == SUPERVISED:
        supervise(student, processor, cell, settings)
    elif cell.arm != BEFORE:
        run = train(student, teacher, processor, cell, settings, out)
    run["validation_end"] = accuracy(student, processor, validation)["answers"]
    if cell.seed == settings.tuning_seed:
        return run
    test = take("test", settings.test_size, seed=0, noise=noise)
    found = assess(student, teacher, processor, test)
    if cell.arm == BEFORE:
        run["teacher"] = accuracy(teacher, processor, test)
        run["geometry"] = geometry(student, teacher, processor, validation)
    return {**run, **found}


def supervise(student: Any, processor: Any, cell: Cell, settings: StudySettings) -> None:
    """Trains the student in place on as many full answers in its own phrasing: what its vision can still learn."""
    from ..pretraining import Phase, fit, lessons, progress_bar

    recipe = settings.recipes[cell.student]
    phase = Phase(settings.steps, text_only=0.0, learning_rate=cell.rate, batch_size=settings.batch_size)
    stream = lessons(phase, recipe.habits, 100 + cell.seed, recipe.noise)
    with progress_bar(settings.steps, cell.name, line()) as bar:
        fit(student, processor, stream, settings.steps, cell.rate, phase.rate, bar)


def train(student: Any, teacher: Any, processor: Any, cell: Cell, settings: StudySettings, out: Path) -> dict[str, Any]:
    """Distils the student in place; returns what `demo.distillation` returns."""
    options = short_run_options(settings, out, cell.name, cell.seed, cell.rate) | {**ARMS, **PARTS}[cell.arm]
    noise = settings.recipes["teacher"].noise
    return distillation(student, teacher, processor, options, settings, cell.seed, cell.name, noise=noise)


def assess(student: Any, teacher: Any, processor: Any, questions: Sequence[Any]) -> dict[str, Any]:
    """Greedy answers to held-out questions.

    Returns:
        `test` as of `grading.grade`; `right`, 0 or 1 for each question; `bins`: for each term the means over the tokens
        of `BINS` bins of equal count by the teacher's visual dependency.
    """
    import torch

    from vgs_kernels import VGSObjective

    from ...data.responses import response_texts
    from ...evaluation.geometry import equal_bins
    from ...evaluation.token_terms import score_responses
    from ..grading import grade, greedy_answers
    from ..pictures import scorer

    answers = greedy_answers(student, processor, questions)
    texts = response_texts(processor, answers)
    records = [question.record() for question in questions]
    rows = score_responses(student, teacher, processor, records, answers, VGSObjective())
    tokens = {term: torch.cat([row[term] for row in rows]) for term in TERMS}
    parts = equal_bins(tokens["vds"], BINS)
    bins = {term: [tokens[term][part].mean().item() for part in parts] for term in TERMS}
    right = [int(scorer(text, question.answer)) for text, question in zip(texts, questions, strict=True)]
    return {"test": grade(processor, questions, answers), "right": right, "bins": bins}


def geometry(student: Any, teacher: Any, processor: Any, questions: Sequence[Any]) -> dict[str, Any]:
    """Angles and norms of the gradients of the terms by visual dependency, on sampled responses; see `measure`."""
    from ...data.prompts import encode_groups
    from ...evaluation.geometry import GeometryProbe, measure
    from ...evaluation.kl_gap import on_policy
    from ...evaluation.sampling import Sampling
    from ...models.families import placeholder_ids
    from ...models.forward import score_groups
    from ...models.heads import read_head

    records = [question.record() for question in questions]
    answers = on_policy(student, processor, records, Sampling(greedy=False, max_new_tokens=32), seed=0, batch_size=128)
    groups = encode_groups(processor, records, [[ids] for ids in answers], placeholder_ids(student.config), "cpu")
    batches = [groups[first : first + 32] for first in range(0, len(groups), 32)]
    head = read_head(teacher, teacher.dtype)
    return measure(GeometryProbe(student, batches, lambda groups: score_groups(teacher, groups), head), BINS)
