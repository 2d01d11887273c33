"""The loss suite: every method on every job and size, in turns, beside the floor."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from .accuracy import Exact, vds_threshold
from .jobs import JOBS, Job
from .measure import is_out_of_memory, memory_limit, peak_extra_bytes, seconds
from .methods import FLOOR, METHODS, Context, runner
from .problem import SHAPES, DenseProblem, Shape, make_problem
from .results import Results, Row

_WARM_UP_TOKENS = 64
#: More rounds than the fewest only as long as a job takes no longer than this.
_FEWEST_ROUNDS, _JOB_SECONDS = 3, 8.0
_INPUTS = 3  # inputs of successive calls differ, so that none finds its own in a cache


@dataclass(frozen=True)
class Cell:
    """One size and what is measured there."""

    shape: str
    tokens: int
    jobs: tuple[str, ...] = tuple(JOBS)
    methods: tuple[str, ...] = tuple(METHODS)


_MAIN = ("vgs", "reverse-kl")
_PEERS = tuple(name for name in METHODS if name != "compile")  # compiled anew for every shape: once is enough
#: What is measured by default, the most important first.
PLANS = {
    "cpu": [
        Cell("cpu", 512, _MAIN),
        Cell("cpu", 2048, _MAIN, ("ours", "eager", "trl")),
        Cell("cpu", 512, tuple(job for job in JOBS if job not in _MAIN), ("ours", "eager")),
    ],
    "gpu": [
        Cell("8b-2b", 8192),
        *(Cell("8b-2b", tokens, _MAIN) for tokens in (65_536, 1024, 32_768, 2048, 16_384, 4096)),
        Cell("8b-4b", 8192, _MAIN, _PEERS),
        *(Cell(name, 8192, _MAIN, _PEERS) for name in ("gemma-12b-4b", "llava-13b-7b", "32b-8b", "8b-0.6b")),
    ],
}


@dataclass
class _Entry:
    """A method under measurement."""

    run: Callable[[DenseProblem], None] | None = None
    status: str = "ok"
    peak_extra_bytes: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)


def _attempt(entry: _Entry, action: Callable[[], None]) -> None:
    """Run something of a method; what it raises becomes its status, and it takes no further part."""
    try:
        action()
    except Exception as error:
        if is_out_of_memory(error):
            entry.status = "out of memory"
        else:
            traceback.print_exc()
            entry.status = f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        entry.run = None
        error.__traceback__ = None  # its frames hold the tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _gradient_bytes(problem: DenseProblem, job: Job) -> int:
    return sum(getattr(problem, name).nbytes for name in job.trainable)


def _prepare(
    name: str, context: Context, exact: Callable[[str | None], Exact], device: str, with_errors: bool
) -> _Entry:
    """Build a method, warm it up, and take its gradient error and its peak memory."""
    entry = _Entry()
    problem, job = context.problem, context.job

    def build() -> None:
        entry.run = runner(name, context)
        if name == FLOOR or not METHODS[name].compiles:  # imports, libraries' buffers
            small = problem.first(_WARM_UP_TOKENS)
            runner(name, Context(small, job, context.threshold))(small.leaves(job.trainable))

    def first_call() -> None:
        leaves = problem.leaves(job.trainable)
        peak = peak_extra_bytes(lambda: entry.run(leaves), device)
        if name == FLOOR:
            return
        if METHODS[name].compiles:
            fresh = problem.leaves(job.trainable)
            peak = peak_extra_bytes(lambda: entry.run(fresh), device)
        entry.peak_extra_bytes = peak
        if with_errors:
            entry.errors = exact(METHODS[name].definition).errors(leaves)

    reason = None if name == FLOOR else METHODS[name].missing(device)
    if reason is not None:
        entry.status = reason
        return entry
    _attempt(entry, build)
    if entry.run is not None:
        _attempt(entry, first_call)
    return entry


def _rounds(entries: dict[str, _Entry], inputs: Sequence[DenseProblem], job: Job, device: str, rounds: int) -> None:
    """Time all methods in turns, so that drift of the machine meets them all."""
    start = time.monotonic()
    for index in range(rounds):
        if index >= _FEWEST_ROUNDS and time.monotonic() - start > _JOB_SECONDS:
            return
        for entry in entries.values():
            if entry.run is None:
                continue
            leaves = inputs[index % len(inputs)].leaves(job.trainable)
            _attempt(entry, lambda e=entry, x=leaves: e.seconds.append(seconds(lambda: e.run(x), device)))


def measure_job(
    problem: DenseProblem,
    shape_name: str,
    job_name: str,
    methods: Sequence[str],
    device: str,
    *,
    rounds: int,
    with_errors: bool = True,
) -> list[Row]:
    """Rows of one job on one problem, the floor's first.

    Args:
        problem: with hidden states; a job on given logits forms them here.
        methods: names out of ``METHODS``; those that cannot do the job are left out.
        rounds: timed calls of each method; fewer if they take long.
        with_errors: whether to compare gradients with float64.
    """
    job = JOBS[job_name]
    shape = Shape(*problem.student_weight.shape, problem.teacher_weight.shape[1])
    dtype = str(problem.student.dtype).removeprefix("torch.")
    if job.dense:
        problem = problem.dense()
    threshold = None
    if job.objective.lam > 0 and (with_errors or job.threshold_given):
        threshold = vds_threshold(problem, job.objective.vds_quantile)
    exact_of: dict[str | None, Exact] = {}

    def exact(definition: str | None) -> Exact:
        if definition not in exact_of:
            exact_of[definition] = Exact.of(problem, job, threshold, definition)
        return exact_of[definition]

    context = Context(problem, job, threshold)
    names = [FLOOR, *(name for name in methods if METHODS[name].jobs(job))]
    entries: dict[str, _Entry] = {}
    for name in tqdm(names, desc=f"{shape_name} N {problem.tokens} {job_name}: warm-up", unit="method", leave=False):
        entries[name] = _prepare(name, context, exact, device, with_errors)
    exact_of.clear()
    inputs = [problem.rotated(i * problem.tokens // _INPUTS) for i in range(_INPUTS)]
    _rounds(entries, inputs, job, device, rounds)
    common = {
        "shape": shape_name,
        **shape._asdict(),
        "tokens": problem.tokens,
        "dtype": dtype,
        "job": job_name,
        "floor_flops": job.flops(shape, problem.tokens),
        "compulsory_bytes": job.compulsory_bytes(shape, problem.tokens, problem.student.element_size()),
        "gradient_bytes": _gradient_bytes(problem, job),
    }
    return [
        {
            **common,
            "method": name,
            "status": entry.status,
            "seconds": entry.seconds,
            "peak_extra_bytes": entry.peak_extra_bytes,
            "gradient_errors": entry.errors,
        }
        for name, entry in entries.items()
    ]


def run(
    cells: Sequence[Cell],
    results: Results,
    device: str,
    dtype: torch.dtype,
    *,
    rounds: int,
    deadline: float | None = None,
) -> Iterator[list[Row]]:
    """Measure the cells and add their rows to the results; cells after the deadline (``time.monotonic``) are named."""
    results.environment["ceilings"] = ceilings(device, dtype)
    results.environment["not_reached"] = []
    with memory_limit(device):
        for cell in tqdm(cells, desc="loss", unit="size"):
            problem = None
            for job_name in cell.jobs:
                if deadline is not None and time.monotonic() > deadline:
                    results.environment["not_reached"].append(f"{cell.shape} N {cell.tokens} {job_name}")
                    results.save()
                    continue
                problem = problem or make_problem(SHAPES[cell.shape], cell.tokens, dtype, device)
                rows = measure_job(problem, cell.shape, job_name, cell.methods, device, rounds=rounds)
                results.add(*rows)
                yield rows


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches: FLOP/s of a large square product of random numbers, bytes/s of a large copy."""
    size, elements = (8192, 1 << 30) if device == "cuda" else (1024, 1 << 27)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        first = seconds(call, device)
        return min(seconds(call, device) for _ in range(1 if first > 1 else 10))

    product, copy = best(lambda: torch.mm(a, b)), best(lambda: target.copy_(source))
    return {"flops": 2 * size**3 / product, "bytes_per_second": 2 * source.nbytes / copy}
