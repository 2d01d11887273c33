"""Predicts how long a call with a ``gradient_tolerance`` takes on a GPU; see time_model.py. Nothing here is measured.

What share of the columns is kept depends on the rows and is given: of rows of 1.15 nats with a language model's tails
and a vocabulary of 151,936 the passes kept 0.13 of the columns of a block of 2,048 rows, for a tolerance of 0.001.

    python -m tests.emulation.device.build -m tests.emulation.device.tolerance_model [--kept 0.13] [--write]
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.jobs import JOBS
from benchmarks.methods import Context, runner
from benchmarks.problem import SHAPES
from vgs_kernels import gradients
from vgs_kernels.active_columns import Passes
from vgs_kernels.rows.columns_triton import PASSES

from ..triton_device import Device, install
from .record import move_at_most, record
from .time_model import (
    DEVICES,
    PREDICTED,
    SHAPE,
    TOKENS,
    PerEntry,
    executed_costs,
    make_problem,
    per_entry,
    predict,
    put_right,
)
from .values import CPUValues

WRITTEN = PREDICTED.with_name("tolerance.json")
MODELLED = ("vgs", "reverse-kl", "jsd")
KERNELS = ("row_sums_kernel", "thresholds_kernel", "below_kernel")
#: Rows and columns of the blocks that are executed: whole rows, and as many as a program goes through.
_ROWS, _COLUMNS = (8, SHAPES[SHAPE].vocab), (256, 4096)
#: Seconds in which a device has nothing to do while the host waits for it and starts again.
_WAIT = 20e-6
_ITEM = 2


def pass_costs(device: Device) -> dict[str, PerEntry]:
    """Of the kernels that read a block, by name."""
    device.execute = True
    device.launches.clear()
    with CPUValues():
        for size in (_COLUMNS, _ROWS):
            block = torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_()
            mass = PASSES.row_sums(block)[0]
            thresholds, _ = PASSES.guess(block, mass, 1e-3)
            if size == _COLUMNS:
                PASSES.sum_below(block, None, 1 / (thresholds * mass), mass.new_zeros(block.shape[1]))
    device.execute = False
    sizes = {launch.kernel: _COLUMNS if launch.kernel == "below_kernel" else _ROWS for launch in device.launches}
    # The last launch of a kernel is that of its size.
    return {x.kernel: per_entry(x, sizes[x.kernel][0] * sizes[x.kernel][1]) for x in device.launches}


def predictions(kept: float) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds by device, job, and part."""
    device, shape = install(Device(kind="cuda", execute=False)), SHAPES[SHAPE]
    of_passes, found = pass_costs(device), {name: {} for name in DEVICES}
    for name in MODELLED:
        costs, blocks = executed_costs(device, JOBS[name]), []

        def active(d_logits: Tensor, mass: Tensor, tolerance: float, passes: Passes, blocks: list = blocks) -> Tensor:
            columns = d_logits.shape[1]
            thresholds, _ = passes.guess(d_logits, mass, tolerance)
            failed = passes.sum_below(d_logits, None, thresholds, mass.new_zeros(columns)) > 1
            bool(mass.isfinite().all()), bool(failed.any()), bool(failed.any())  # the host waits as often
            blocks.append(len(d_logits))
            return torch.arange(int(kept * columns), device="cuda")

        problem = make_problem(shape, TOKENS)
        call: Any = runner("tolerance-1e-3", Context(problem, JOBS[name], None))
        move_at_most(0)
        with put_right(), mock.patch.object(gradients, "active_columns", active):
            counted = record(device, lambda c=call, p=problem, j=JOBS[name]: c(p.leaves(j.trainable)))
        move_at_most(2**62)
        counted.launches = [launch for launch in counted.launches if launch.kernel not in KERNELS]
        columns = int(kept * shape.vocab)
        for title, hardware in DEVICES.items():
            parts = Counter(predict(counted, costs, shape.vocab, hardware))
            for rows in blocks:
                parts["passes"] += sum(cost.seconds(rows * shape.vocab, hardware) for cost in of_passes.values())
                parts["passes"] += of_passes["row_sums_kernel"].seconds(rows * columns, hardware)
                # Gathered and written: gradients, the head, and twice the head's gradient in float32.
                moved = 2 * _ITEM * columns * (rows + shape.student) + 4 * 4 * columns * shape.student
                parts["gathers"] += moved / hardware.bandwidth
            parts["waits"] = _WAIT * len(counted.waits)
            found[title][name] = dict(parts)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", type=float, default=0.13, help="share of a block's columns")
    parser.add_argument("--write", action="store_true", help=f"keep them in {WRITTEN.name}")
    args = parser.parse_args()
    found = predictions(args.kept)
    for device, jobs in found.items():
        for job, parts in jobs.items():
            text = ", ".join(f"{name} {1e3 * x:.1f}" for name, x in parts.items())
            print(f"{device} {job:12} {1e3 * sum(parts.values()):6.1f} ms: {text}")
    if args.write:
        made = {"shape": SHAPE, "tokens": TOKENS, "dtype": "bfloat16", "kept": args.kept, "devices": found}
        WRITTEN.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
