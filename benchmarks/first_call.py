"""The first call of a fresh process: nothing is compiled, set aside or warm in it but what made the rows.

Every call has a process of its own; methods take turns. What a method imports is imported before, and what it compiles
is compiled during the call. Compilers keep results on the disk: how many files they had is in the result file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from .accuracy import vds_threshold
from .jobs import JOBS
from .loss import attempt, describe_cell, methods_of
from .measure import memory_limit, seconds
from .methods import FLOOR, METHODS, Context, runner
from .results import ROOT, Row
from .rows import Inputs


def disk_caches() -> dict[str, int]:
    """Files that the compilers have kept on the disk."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    home = Path.home()
    folders = {
        "torch.compile": Path(cache_dir()),
        "triton": Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache"),
        "vgs_kernels": Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "vgs_kernels",
    }
    return {name: sum(path.is_file() for path in folder.rglob("*")) for name, folder in folders.items()}


def first_calls(inputs: Inputs, shape: str, tokens: int, job: str, methods: Sequence[str], *, rounds: int) -> list[Row]:
    """Rows of one job as ``measure_job`` makes them, with ``rounds`` processes for each method.

    Raises:
        RuntimeError: the floor's process has failed.
    """
    rows: dict[str, Row] = {}
    turns = [name for _ in range(rounds) for name in methods_of(JOBS[job], methods)]
    for name in tqdm(turns, desc=f"{shape} N {tokens} {job}: first calls", unit="process", leave=False):
        if name in rows and rows[name]["status"] != "ok":
            continue
        wanted = {"inputs": asdict(inputs), "shape": shape, "tokens": tokens, "job_name": job, "method": name}
        command = [sys.executable, "-m", "benchmarks.first_call", json.dumps(wanted)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode == 0:
            row = json.loads(done.stdout.splitlines()[-1])
        elif name == FLOOR:
            raise RuntimeError(f"a process has ended with {done.returncode}: {done.stderr[-2000:]}")
        else:
            row = {**rows[FLOOR], "method": name, "status": f"failed: exit status {done.returncode}", "seconds": []}
        row["seconds"] = [*rows.get(name, {}).get("seconds", ()), *row["seconds"]]
        rows[name] = row
    return list(rows.values())


def first_call(inputs: Inputs, shape: str, tokens: int, job_name: str, method: str) -> Row:
    """One row, of one call in this process. The rows, given logits and a given threshold are made before."""
    job, problem, taken = JOBS[job_name], inputs.make(shape, tokens), []
    measured = problem.dense() if job.dense else problem
    threshold = vds_threshold(measured, job.objective.vds_quantile) if job.threshold_given else None

    def call() -> None:
        run, leaves = runner(method, Context(measured, job, threshold)), measured.leaves(job.trainable)
        taken.append(seconds(lambda: run(leaves), inputs.device))

    status = None if method == FLOOR else METHODS[method].missing(inputs.device, measured.forms)
    if status is None:
        with memory_limit(inputs.device):
            status = attempt(call)
    row = {"method": method, "status": status, "seconds": taken, "peak_extra_bytes": None, "gradient_errors": {}}
    return {**describe_cell(problem, shape, job_name), **row}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(first_call(Inputs(**given.pop("inputs")), **given)))
