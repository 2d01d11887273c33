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
from .methods import EXACT, FLOOR, METHODS, Context, runner
from .problem import DenseProblem, Problem, Shape, entropy
from .results import Results, Row
from .rows import Inputs

_WARM_UP_TOKENS = 64
#: More rounds than the fewest only as long as a job takes no longer than this.
_FEWEST_ROUNDS, _JOB_SECONDS = 3, 5.0
_ENTROPY_TOKENS = 64  # spread over all, whose mean is shown
_INPUTS = 3  # inputs of successive calls differ, so that none finds its own in a cache


@dataclass(frozen=True)
class Cell:
    """One size and what is measured there."""

    shape: str
    tokens: int
    jobs: tuple[str, ...] = tuple(JOBS)
    methods: tuple[str, ...] = EXACT


_MAIN = ("vgs", "reverse-kl")
_PLAIN = ("forward-kl", "jsd")
_OTHERS = tuple(job for job in JOBS if job not in _MAIN + _PLAIN)
_PEERS = tuple(name for name in EXACT if name != "compile")  # compiled anew for every size: once is enough


def _gpu(tokens: int, shape: str = "8b-2b") -> Cell:
    # Liger's chunks are compiled anew for other head sizes, and after a few kinds no more.
    return Cell(shape, tokens, _MAIN, tuple(name for name in _PEERS if shape == "8b-2b" or name != "liger-chunked"))


#: What is measured by default, the most important first.
PLANS = {
    "cpu": [
        Cell("cpu", 512, _MAIN + _PLAIN),
        Cell("cpu", 2048, _MAIN, ("ours", "eager", "trl")),
        Cell("cpu", 512, _OTHERS, ("ours", "eager")),
    ],
    "gpu": [
        Cell("8b-2b", 8192, _MAIN + _PLAIN),
        *(_gpu(65_536), _gpu(1024), _gpu(8192, "8b-4b")),
        Cell("8b-2b", 8192, _OTHERS, ("ours", "eager")),
        *(_gpu(32_768), _gpu(8192, "gemma-12b-4b"), _gpu(8192, "llava-13b-7b"), _gpu(4096), _gpu(16_384), _gpu(2048)),
        *(_gpu(8192, "32b-8b"), _gpu(8192, "8b-0.6b")),
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


def describe_failure(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def release_frames(error: Exception) -> None:
    """Give back what the frames of an exception hold."""
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def attempt(action: Callable[[], object]) -> str:
    """Run something; ``"ok"``, or what it raised as a status."""
    try:
        action()
    except Exception as error:
        if not is_out_of_memory(error):
            traceback.print_exc()
        release_frames(error)
        return describe_failure(error)
    return "ok"


def _attempt(entry: _Entry, action: Callable[[], None]) -> None:
    """Run something of a method; what it raises becomes its status, and it takes no further part."""
    status = attempt(action)
    if status != "ok":
        entry.status, entry.run = status, None


def _gradient_bytes(problem: Problem, job: Job) -> int:
    if job.dense:
        return len(job.trainable) * problem.tokens * len(problem.student_weight) * problem.student.element_size()
    return sum(getattr(problem, name).nbytes for name in job.trainable)


def _prepare(name: str, context: Context, device: str) -> tuple[_Entry, DenseProblem | None]:
    """Build a method, warm it up and take its peak memory; also returns the leaves that hold its gradients."""
    entry = _Entry()
    problem, job = context.problem, context.job
    leaves = problem.leaves(job.trainable)

    def build() -> None:
        entry.run = runner(name, context)
        if name == FLOOR or not METHODS[name].compiles:  # imports, libraries' buffers
            small = problem.first(_WARM_UP_TOKENS)
            runner(name, Context(small, job, context.threshold))(small.leaves(job.trainable))

    def first_call() -> None:
        if name != FLOOR and METHODS[name].compiles:
            entry.run(problem.leaves(job.trainable))
        peak = peak_extra_bytes(lambda: entry.run(leaves), device)
        entry.peak_extra_bytes = None if name == FLOOR else peak

    reason = None if name == FLOOR else METHODS[name].missing(device, problem.forms)
    if reason is not None:
        entry.status = reason
        return entry, None
    _attempt(entry, build)
    if entry.run is not None:
        _attempt(entry, first_call)
    return entry, None if entry.run is None else leaves


def _rounds(entries: dict[str, _Entry], inputs: Sequence[DenseProblem], job: Job, device: str, rounds: int) -> None:
    """Time all methods in turns, so that drift of the machine meets them all."""

    def turn(index: int, keep: bool) -> None:
        for entry in entries.values():
            leaves = inputs[index % len(inputs)].leaves(job.trainable)

            def timed(entry: _Entry = entry, leaves: DenseProblem = leaves) -> None:
                sample = seconds(lambda: entry.run(leaves), device)
                if keep:
                    entry.seconds.append(sample)

            if entry.run is not None:
                _attempt(entry, timed)

    if device == "cuda":
        turn(0, keep=False)  # the allocator's cache was emptied to measure memory
    start = time.monotonic()
    for index in range(rounds):
        if index >= _FEWEST_ROUNDS and time.monotonic() - start > _JOB_SECONDS:
            return
        turn(index, keep=True)


def describe_cell(problem: Problem, shape_name: str, job_name: str) -> Row:
    """What the rows of all methods share."""
    job, dtype = JOBS[job_name], str(problem.student.dtype).removeprefix("torch.")
    some = slice(None, None, -(-problem.tokens // _ENTROPY_TOKENS))
    shape = Shape(*problem.student_weight.shape, problem.teacher_weight.shape[1])
    return {
        "shape": shape_name,
        **shape._asdict(),
        "tokens": problem.tokens,
        "dtype": dtype,
        "entropy": entropy(problem.logits(some, ("student",))[0]),
        "job": job_name,
        "floor_flops": job.flops(shape, problem.tokens),
        "compulsory_bytes": job.compulsory_bytes(shape, problem.tokens, problem.student.element_size()),
        "gradient_bytes": _gradient_bytes(problem, job),
    }


def methods_of(job: Job, methods: Sequence[str]) -> list[str]:
    """The floor, and which of the methods can do a job."""
    return [FLOOR, *(name for name in methods if METHODS[name].jobs(job))]


def measure_job(
    problem: Problem,
    shape_name: str,
    job_name: str,
    methods: Sequence[str],
    device: str,
    *,
    rounds: int,
) -> list[Row]:
    """Rows of one job on one problem, the floor's first.

    Args:
        problem: with hidden states; a job on given logits forms them here.
        methods: names out of ``METHODS``; those that cannot do the job are left out.
        rounds: timed calls of each method; fewer if they take long.
    """
    job = JOBS[job_name]
    common = describe_cell(problem, shape_name, job_name)
    if job.dense:
        problem = problem.dense()
    threshold = vds_threshold(problem, job.objective.vds_quantile) if job.objective.lam > 0 else None
    # Rotated inputs take memory: they are there before anything is found to fit.
    inputs = [problem, *(problem.rotated(i * problem.tokens // _INPUTS) for i in range(1, _INPUTS))]
    context = Context(problem, job, threshold)
    names = methods_of(job, methods)
    entries: dict[str, _Entry] = {}
    exact: Exact | None = None
    for name in tqdm(names, desc=f"{shape_name} N {problem.tokens} {job_name}: warm-up", unit="method", leave=False):
        entries[name], leaves = _prepare(name, context, device)
        if leaves is None or name == FLOOR or not METHODS[name].same_loss:
            continue
        exact = exact or Exact.of(problem, job, threshold)
        entries[name].errors = exact.errors(leaves)
        del leaves
    del exact
    _rounds(entries, inputs, job, device, rounds)
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
    inputs: Inputs,
    *,
    rounds: int,
    deadline: float | None = None,
    first_call: bool = False,
) -> Iterator[list[Row]]:
    """Measure the cells and add their rows to the results, which also name what is missing and why.

    After the deadline (of ``time.monotonic``) nothing new is started. ``first_call``: in a process for each call, see
    ``first_call.py``.
    """
    from .first_call import disk_caches, first_calls

    device, source = inputs.device, inputs.source
    results.environment["ceilings"] = ceilings(device, getattr(torch, inputs.dtype))
    if first_call:
        results.environment["disk_caches"] = disk_caches()
    missing = {f"{cell.shape} N {cell.tokens} {job}": "not reached" for cell in cells for job in cell.jobs}
    results.environment["missing"] = missing
    results.save()
    with memory_limit(device):
        for cell in tqdm(cells, desc="loss", unit="size"):
            problem = None
            for job in cell.jobs:
                if deadline is not None and time.monotonic() > deadline:
                    continue
                name = f"{cell.shape} N {cell.tokens} {job}"
                try:
                    if first_call:
                        rows = first_calls(inputs, cell.shape, cell.tokens, job, cell.methods, rounds=rounds)
                    else:
                        problem = problem or inputs.make(cell.shape, cell.tokens)
                        rows = measure_job(problem, cell.shape, job, cell.methods, device, rounds=rounds)
                except Exception as error:
                    traceback.print_exc()
                    missing[name] = describe_failure(error)
                    results.save()
                    release_frames(error)
                    continue
                del missing[name]
                rows = [{**row, "rows": source} for row in rows]
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
