"""The step suite: every method takes the same training step, phase by phase, in turns."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from vgs.models.families import placeholder_ids
from vgs.models.padding import pad_prompts

from .loss import attempt
from .measure import memory_limit, peak_extra_bytes, seconds
from .methods import METHODS as LOSSES
from .results import Results, Row
from .step_hybrids import HYBRIDS
from .step_methods import METHODS, Step, differing, plain_loss_name, unmeasured
from .step_problem import (
    PAIRS,
    PAPER,
    SINGLE,
    TOYS,
    Load,
    add_pixels,
    make_groups,
    make_model,
    micro_batches,
    response_tokens,
)

ROLLOUT = "rollout"
LONGEST = "longest"  # the job of finding the longest response that fits
#: How far a method's loss and gradient norm may be from the first method's of the same objective.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}
_LENGTHS = 1024, 65_536  # of the responses that are tried, and how finely
_STEP = 512


@dataclass(frozen=True)
class Cell:
    """One pair of models, one job (``"G1"``, ``"G4"`` or ``LONGEST``) and the methods that do it."""

    pair: str
    job: str
    methods: tuple[str, ...]

    @property
    def load(self) -> Load:
        if self.job == LONGEST:
            return SINGLE
        return TOYS.get(self.pair, PAPER)[int(self.job[1:])]


def _cell(pair: str, generations: int) -> Cell:
    return Cell(pair, f"G{generations}", differing(generations))


_COMPARED = ("vgs-naive", "vgs", "plain")
#: For families that used to run padded: the step of then, and what packed rows make of it.
_HYBRID = ("plain", "vgs-naive", "vgs-padded", "vgs", "vgs-shared")
#: What is measured by default, the most important first.
PLANS = {
    **{toy: [Cell(toy, "G4", _HYBRID)] if toy in HYBRIDS else [_cell(toy, 1), _cell(toy, 4)] for toy in TOYS},
    "gpu": [
        *(_cell("8b-2b", 4), _cell("8b-2b", 1), _cell("8b-4b", 4), Cell("8b-2b", LONGEST, _COMPARED)),
        *(_cell("8b-4b", 1), Cell("8b-8b", "G4", ("vgs-shared",)), Cell("8b-4b", LONGEST, _COMPARED)),
    ],
}


@dataclass
class Recorder:
    """A ``Phase`` that keeps a number for each name: the sum or the largest of what ``measure`` says of its calls."""

    measure: Callable[[Callable[[], None], str], float | None]
    join: Callable[[tuple[float, float]], float]
    device: str
    values: dict[str, float] = field(default_factory=dict)

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        results = []
        value = self.measure(lambda: results.append(function(*arguments, **options)), self.device)
        if value is not None:
            self.values[name] = self.join((self.values.get(name, 0), value))
        return results[0]


@dataclass
class _Entry:
    """A method under measurement."""

    status: str = "ok"
    loss: float | None = None
    gradient_norm: float | None = None
    peak_extra_bytes: int | None = None
    phase_peak_bytes: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)


def _attempt(entry: _Entry, action: Callable[[], None]) -> None:
    """Run something of a method that is still in the race; what it raises becomes its status."""
    if entry.status == "ok":
        entry.status = attempt(action)


def make_step(cell: Cell, device: str, dtype: torch.dtype) -> Step:
    """Models, optimizer state and batches. The student's weights are float32, under autocast to another ``dtype``."""
    student, teacher = (make() for make in PAIRS[cell.pair])
    groups = add_pixels(make_groups(cell.load, student), student, device)
    model = make_model(student, torch.float32, device, trainable=True)
    step = Step(
        model,
        make_model(teacher, dtype, device, trainable=False),
        micro_batches(groups, cell.load),
        device,
        None if dtype == torch.float32 else dtype,
        torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=1e-2, fused=True),
    )
    for parameter in step.student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimize()  # allocates the optimizer's state
    return step


def _check(entry: _Entry, name: str, step: Step) -> None:
    """One micro-batch: warms up, and says what the method computes."""
    step.student.zero_grad()
    entry.loss = METHODS[name].run(METHODS[name], replace(step, batches=step.batches[:1]), unmeasured).item()
    gradients = [x.grad for x in step.student.parameters() if x.grad is not None]
    entry.gradient_norm = torch.nn.utils.get_total_norm(gradients).item()


def _agree(entries: dict[str, _Entry], tolerance: float) -> None:
    """A method that computes something else than the first with its objective takes no further part."""
    for name, entry in entries.items():
        alike = (other for other in entries if METHODS[other].objective == METHODS[name].objective)
        first = next((other for other in alike if entries[other].status == "ok"), name)
        for label in ("loss", "gradient_norm"):
            got, expected = getattr(entry, label), getattr(entries[first], label)
            if entry.status == "ok" and not abs(got - expected) <= tolerance * abs(expected):
                entry.status = f"failed: {label} {got:.6g}, {first} has {expected:.6g}"


def _memory(entry: _Entry, name: str, step: Step) -> None:
    method = METHODS[name]
    step.student.zero_grad(set_to_none=False)  # gradients are there before, so activations alone are counted
    entry.peak_extra_bytes = peak_extra_bytes(partial(method.run, method, step, unmeasured), step.device)
    recorder = Recorder(peak_extra_bytes, max, step.device)
    method.run(method, step, recorder)
    recorder("optimizer", step.optimize)
    entry.phase_peak_bytes = recorder.values


def _time(entry: _Entry, name: str, step: Step) -> None:
    method, recorder = METHODS[name], Recorder(seconds, sum, step.device)
    step.student.zero_grad()
    method.run(method, step, recorder)
    recorder("optimizer", step.optimize)
    entry.seconds.append(sum(recorder.values.values()))
    for phase, value in recorder.values.items():
        entry.phase_seconds.setdefault(phase, []).append(value)


def _expired(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def measure_cell(
    step: Step, names: Sequence[str], rounds: int, tolerance: float, deadline: float | None = None
) -> dict[str, _Entry]:
    """Every method checked, then its memory, then its time, in turns; at least one round unless one fails."""
    entries = {name: _Entry() for name in names}
    for name, entry in entries.items():
        _attempt(entry, partial(_check, entry, name, step))
    _agree(entries, tolerance)
    for name, entry in entries.items():
        _attempt(entry, partial(_memory, entry, name, step))
    for index in range(rounds):
        if index and _expired(deadline):
            break
        for name, entry in entries.items():
            _attempt(entry, partial(_time, entry, name, step))
    step.student.zero_grad()
    return entries


def measure_rollout(step: Step, load: Load) -> Row:
    """Sampling with the student by ``generate`` and a KV cache: the prompts, and ``load.sampled`` tokens after them.

    ``computed_seconds`` is what the batch's longest response would take at the measured pace of a token.
    """
    groups = [group for batch in step.batches for group in batch]
    lengths = [length for group in groups for length in group.response_lengths]
    prompts = [single for group in groups for single in group.alone()]
    ids, mask, fields = pad_prompts(prompts, 0)
    inputs = {"input_ids": ids, "attention_mask": mask, **fields}
    inputs = {name: value.to(step.device) for name, value in inputs.items()}

    @torch.no_grad()
    def generate(tokens: int) -> None:
        with step.computing():
            step.student.generate(
                **inputs,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=True,
                use_cache=True,
                suppress_tokens=placeholder_ids(step.student.config),
            )

    sampled = load.sampled or max(lengths)
    step.student.eval()  # gradient checkpointing would go without the cache
    try:
        generate(2)
        first, whole = (seconds(partial(generate, tokens), step.device) for tokens in (1, sampled))
    finally:
        step.student.train()
    pace = (whole - first) / max(sampled - 1, 1)
    return {
        "method": ROLLOUT,
        "status": "ok",
        "seconds": [whole],
        "sampled": sampled,
        "sequences": len(lengths),
        "prefill_seconds": first,
        "longest": max(lengths),
        "computed_seconds": first + (max(lengths) - 1) * pace,
    }


def longest_response(step: Step, name: str, deadline: float | None = None) -> Row:
    """The longest responses of the first micro-batch, all of one length, whose gradients fit.

    Returns:
        ``fits``: a length that fits. ``fails``: one that does not, within ``_STEP`` of it unless the time ran out;
        None where every length that was tried fits.
    """
    generator = torch.Generator().manual_seed(0)

    def fits(length: int) -> bool:
        groups = [
            replace(
                group, responses=tuple(torch.randint(1, 1000, (length,), generator=generator) for _ in group.responses)
            )
            for group in step.batches[0]
        ]
        entry = _Entry()
        step.student.zero_grad(set_to_none=False)
        _attempt(entry, lambda: METHODS[name].run(METHODS[name], replace(step, batches=[groups]), unmeasured))
        if entry.status not in ("ok", "out of memory"):
            raise RuntimeError(entry.status)
        return entry.status == "ok"

    low, high = 0, None
    length = _LENGTHS[0]
    while not _expired(deadline) and length <= _LENGTHS[1] and length - low >= _STEP:
        if fits(length):
            low = length
        else:
            high = length
        length = 2 * low if high is None else (low + high) // 2
    return {"method": name, "status": "ok", "seconds": [], "fits": low, "fails": high, "stopped": _expired(deadline)}


def _rows(cell: Cell, step: Step, rounds: int, deadline: float | None) -> list[Row]:
    if cell.job == LONGEST:
        return [longest_response(step, name, deadline) for name in cell.methods]
    tolerance = _TOLERANCE[step.autocast or torch.float32]
    entries = measure_cell(step, cell.methods, rounds, tolerance, deadline)
    sampling = _Entry()
    row: Row = {}
    _attempt(sampling, lambda: row.update(measure_rollout(step, cell.load)))
    rows = [{"method": name, **vars(entry)} for name, entry in entries.items()]
    return [row or {"method": ROLLOUT, "status": sampling.status, "seconds": []}, *rows]


def _cell_rows(cell: Cell, device: str, dtype: torch.dtype, rounds: int, deadline: float | None) -> list[Row]:
    """Where the models themselves do not fit, every method is a row that says so."""
    rows: list[Row] = []
    status = attempt(lambda: rows.extend(_rows(cell, make_step(cell, device, dtype), rounds, deadline)))
    return rows or [{"method": name, "status": status, "seconds": []} for name in cell.methods]


@contextlib.contextmanager
def _libraries_unsearched() -> Iterator[None]:
    """Spare every measurement of memory a search of the loaded libraries for garbage."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def run(
    cells: Sequence[Cell],
    results: Results,
    device: str,
    dtype: torch.dtype,
    *,
    rounds: int,
    deadline: float | None = None,
) -> Iterator[list[Row]]:
    """Measure the cells and add their rows to the results, which also name what is missing.

    After the deadline (of ``time.monotonic``) nothing new is started.
    """
    missing = {f"{cell.pair} {cell.job}": "not reached" for cell in cells}
    results.environment |= {
        "suite": "step",
        "missing": missing,
        "plain_loss": LOSSES[plain_loss_name(device)].title,
        "precision": "float32"
        if dtype == torch.float32
        else "float32 student under bfloat16 autocast, bfloat16 teacher",
    }
    results.save()
    with memory_limit(device), _libraries_unsearched():
        for cell in tqdm(cells, desc="step", unit="cell"):
            if _expired(deadline):
                break
            rows = _cell_rows(cell, device, dtype, rounds, deadline)
            del missing[f"{cell.pair} {cell.job}"]
            common = {
                "shape": cell.pair,
                "tokens": response_tokens(make_groups(cell.load, PAIRS[cell.pair][0]())),
                "dtype": str(dtype).removeprefix("torch."),
                "job": cell.job,
                "load": {**vars(cell.load), "grid": [*cell.load.grid]},
            }
            rows = [{**common, **row} for row in rows]
            results.add(*rows)
            yield rows
