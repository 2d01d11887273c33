"""Predicts how long a call takes on a GPU, from what it asks of the stand-in device. Nothing here is measured.

Three parts add up: products, at the rate that a large one reaches, with idle multiprocessors and the reading of memory
counted; row kernels, bound by memory, by instructions or by special functions, whichever is slowest, as many as the
compiled code executes; and a fixed time for each small kernel. Between two launches the device idles for two
microseconds where they are large. Rows differ by more than a hundredth of a nat, and no entry has nearly all the mass:
of a KL, other tokens are read once more. Of the tokens, three in a hundred are guessed to be on the wrong side of the
gate, or find no slot.

    python -m tests.emulation.device.build -m tests.emulation.device.time_model [--write]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.floor import make_floor
from benchmarks.jobs import JOBS, Job
from benchmarks.methods import Context, runner
from benchmarks.problem import SHAPES, Problem, Shape
from vgs_kernels import steering

from ..triton_device import Device, Launch, install
from .record import Product, Record, move_at_most, record
from .values import CPUValues

PREDICTED = Path(__file__).parents[3] / "benchmarks/results/predicted/times.json"
TOKENS, SHAPE = 8192, "8b-2b"
MODELLED = ("vgs", "vgs-folded", "vgs-frozen-head", "reverse-kl", "forward-kl", "jsd")
#: Seconds of a small kernel, of one program with several hundred steps, and of the gap before a large one.
_SMALL, _SERIAL, _GAP = 2.3e-6, 8e-6, 2e-6
#: Tokens that are executed: three of them pass the gate. One token in so many is put right at the end.
_EXECUTED, _PUT_RIGHT = 10, 33
_PRODUCTS = {"TN": "logits", "NN": "hidden gradient", "NT": "head gradient"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
#: Rows and columns of a product that one multiprocessor works on, and its speed beside the largest's.
_TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.92}
#: A product of few tiles is cut along its inner size if that is at least so long; what it then reaches.
_CUT_LENGTH, _CUT_REACH = 16_384, 0.9
#: Machine instructions of a full-precision division beside the one that PTX shows; a last wave that is not full.
_DIVISION, _LAST_WAVE = 6, 0.96


@dataclass(frozen=True)
class Hardware:
    """One GPU: what a large bf16 product and a large copy reach (FLOP/s, bytes/s), clock, multiprocessors."""

    flops: float
    bandwidth: float
    clock: float = 1.755e9
    processors: int = 132


DEVICES = {"H100": Hardware(700e12, 3.0e12), "H200": Hardware(790e12, 4.3e12)}


class PerEntry(NamedTuple):
    """What a row kernel executes and moves for one token's one column."""

    instructions: float
    special: float
    bytes: float

    def seconds(self, entries: float, hardware: Hardware) -> float:
        """A multiprocessor issues four warps' instructions a cycle, and half a warp's special functions."""
        cycles = hardware.processors * hardware.clock * 32
        bounds = (
            entries * self.instructions / (4 * cycles),
            entries * self.special / (cycles / 2),
            entries * self.bytes / hardware.bandwidth,
        )
        return max(bounds) / _LAST_WAVE


def per_entry(launch: Launch, entries: int) -> PerEntry:
    """From an executed launch. Moves between registers do not occur in machine code."""
    counts = launch.counts.instructions
    kind = Counter()
    for opcode, number in counts.items():
        name = opcode.split(".")[0]
        kind["all"] += 0 if name == "mov" else number
        kind["div"] += number if name == "div" else 0
        kind["special"] += number if name in ("ex2", "lg2", "rcp", "div", "sqrt") else 0
    instructions = kind["all"] + _DIVISION * kind["div"]
    return PerEntry(
        instructions / entries, kind["special"] / entries, (launch.counts.loaded + launch.counts.stored) / entries
    )


def product_seconds(x: Product, hardware: Hardware) -> float:
    """The best of a few ways to cut the result into tiles, or the time of its bytes."""
    flops = 2.0 * x.m * x.n * x.k
    best = math.inf
    for (rows, columns), speed in _TILES.items():
        across, down = math.ceil(x.m / rows), math.ceil(x.n / columns)
        filled = x.m / (across * rows) * x.n / (down * columns)
        waves = math.ceil(across * down / hardware.processors)
        reach = across * down / (waves * hardware.processors) * filled
        if across * down < 0.9 * hardware.processors and x.k > _CUT_LENGTH:
            reach = max(reach, _CUT_REACH * filled)
        best = min(best, flops / (hardware.flops * speed * reach))
    moved = _BYTES[x.a] * (x.m + x.n) * x.k + _BYTES[x.c] * x.m * x.n * (2 if x.adds else 1)
    return max(best, moved / hardware.bandwidth)


def predict(found: Record, costs: dict[str, PerEntry], vocab: int, hardware: Hardware) -> dict[str, float]:
    """Seconds by part of a recorded call whose row kernels read whole rows."""
    parts = Counter()
    for x in found.products:
        parts[_PRODUCTS[x.transposed]] += product_seconds(x, hardware)
        parts["gaps"] += _GAP
    for launch in found.launches:
        cost = costs.get(_variant(launch))
        if cost is None:
            if launch.grid[1] > 1:
                raise ValueError(f"{_variant(launch)} reads rows, and its cost is not known.")
            parts["small"] += _SERIAL if launch.kernel == "slots_kernel" else _SMALL
        else:
            parts["row kernels"] += cost.seconds(launch.grid[0] * vocab, hardware)
            parts["gaps"] += _GAP
    parts["small"] += _SMALL * (len(found.kernels) + found.copies)
    return dict(parts)


def _variant(launch: Launch) -> str:
    return f"{launch.kernel} {sorted((name, str(x)) for name, x in launch.constants.items())}"


def make_problem(shape: Shape, tokens: int) -> Problem:
    """Tensors that nobody has written to."""
    views = [(tokens, shape.student)] * 2 + [(tokens, shape.teacher)] * 2
    sizes = [*views, (shape.vocab, shape.student), (shape.vocab, shape.teacher)]
    return Problem(*(torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes))


def random_problem(shape: Shape, tokens: int) -> Problem:
    """Tensors whose logits deviate by two nats."""
    problem = make_problem(shape, tokens)
    for x in problem.tensors:
        x.normal_(std=1.0 if len(x) == tokens else 2 / x.shape[1] ** 0.5)
    return problem


def _call(problem: Problem, job: Job, floor: bool) -> Any:
    if floor:
        return make_floor(problem, job)
    return runner("ours", Context(problem, job, None))


def put_right() -> Any:
    """Which tokens are put right at the end, the gate of numbers that nobody computed cannot say."""

    def unformed(loss: steering.VGSLoss) -> tuple[torch.Tensor, torch.Tensor]:
        if not loss.guessed:
            return known(loss)
        tokens = torch.arange(0, len(loss.unit_weights), _PUT_RIGHT, device="cuda")
        return tokens, loss.unit_weights[tokens]

    known = steering.VGSLoss.unformed
    return mock.patch.object(steering.VGSLoss, "unformed", unformed)


def executed_costs(device: Device, job: Job) -> dict[str, PerEntry]:
    """What the kernels of a job execute and move, by variant. Few tokens are executed, in the phases that many take."""
    small = Shape(16_384, 64, 64)
    device.execute = True
    with CPUValues(), mock.patch.object(steering, "_FEW_TOKENS", 0), put_right():
        problem = random_problem(small, _EXECUTED)
        executed = record(device, lambda: _call(problem, job, False)(problem.leaves(job.trainable)))
    device.execute = False
    along_columns = (launch for launch in executed.launches if launch.grid[1] > 1)
    return {_variant(launch): per_entry(launch, launch.grid[0] * small.vocab) for launch in along_columns}


def predictions() -> dict[str, Any]:
    """Seconds by device, job, and part; of ours and of the floor."""
    device = install(Device(kind="cuda", execute=False))
    shape, found = SHAPES[SHAPE], {name: {} for name in DEVICES}
    for name in MODELLED:
        job = JOBS[name]
        costs = executed_costs(device, job)
        problem = make_problem(shape, TOKENS)
        move_at_most(0)
        for label in ("ours", "floor"):
            call = _call(problem, job, label == "floor")
            with put_right():
                counted = record(device, lambda c=call, p=problem, j=job: c(p.leaves(j.trainable)))
            for title, hardware in DEVICES.items():
                parts = predict(counted, costs, shape.vocab, hardware)
                found[title].setdefault(name, {})[label] = {"seconds": sum(parts.values()), "parts": parts}
        move_at_most(2**62)
    return {"shape": SHAPE, "tokens": TOKENS, "dtype": "bfloat16", "devices": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"keep them in {PREDICTED.name}")
    args = parser.parse_args()
    found = predictions()
    for device, jobs in found["devices"].items():
        for job, methods in jobs.items():
            ours, floor = methods["ours"], methods["floor"]
            parts = ", ".join(f"{name} {1e3 * x:.1f}" for name, x in ours["parts"].items())
            ratio = floor["seconds"] / ours["seconds"]
            print(f"{device} {job:16} {1e3 * ours['seconds']:6.1f} ms, floor/ours {ratio:.2f}: {parts}")
    if args.write:
        PREDICTED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
