"""Executes compiled kernels on the CPU and compares them with the PyTorch rows; prints the results as JSON.

A script of its own: Triton's interpreter, which other tests need, must be off.

    python -m tests.emulation.run_kernels calls [--part N] [--whole] [--check]
    python -m tests.emulation.run_kernels faults [--each N] [--sure]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from . import adapter
from .cases import Case, all_cases, covering_cases, differences
from .memory import Fault
from .planted import SURE, Planted, planted
from .ptx import Program
from .triton_device import Device, install

TARGETS, SEEDS = (80, 90), (None, 1)
PARTS = len(TARGETS) * len(SEEDS)
#: Kernel -> calls on which faults in it are looked for: together they lead through all of it.
WITNESSES = {
    "statistics_kernel": ["given VGS, aligned, live prior, masked, policy", "given VGS, pitched, live prior"],
    "merge_kernel": ["given VGS, stretches, live prior, policy"],
    "gradient_kernel": [
        "given VGS, aligned, live prior, masked, policy",
        "given VGS, pitched bfloat16, live prior, policy",
        "given, aligned, JSD, clipped top-k, masked",
        "given, pitched bfloat16, JSD, clipped, policy",
    ],
    "slots_kernel": ["slots alone", "slots alone, limited"],
    "pick_kernel": ["given, pitched, sampled, policy", "fused VGS, bfloat16, constant, 9.0, masked, cut, policy"],
    "token_scalars_kernel": [
        "given, short, sampled, clipped, policy",
        "given, short, reverse KL, clipped tokens, policy",
    ],
    "row_sums_kernel": ["passes alone, bfloat16"],
    "thresholds_kernel": ["passes alone, bfloat16"],
    "below_kernel": ["passes alone, bfloat16"],
    "totals_kernel": ["given, aligned, JSD, clipped top-k, masked", "given, aligned, reverse KL, masked"],
}


#: What is sure elsewhere: a quantile of the scores beside the sampled ones is as good.
UNSURE = {"slots_kernel": "address moved"}


def _problems(case: Case, expected: dict[str, torch.Tensor], approximate: bool = False) -> list[str]:
    try:
        return differences(case.run("triton"), expected, approximate)
    except Fault as fault:
        return [str(fault)]


def calls(part: int, whole: bool) -> dict[str, Any]:
    """Every call with one of the targets, its approximate instructions rounded or off by up to 2 ulp.

    Args:
        part: of the combinations of targets and errors, which calls take in turn.
        whole: all calls, not a covering design of them.
    """
    devices = [Device(capability=target, seed=seed) for seed in SEEDS for target in TARGETS]
    rows, launches = [], []
    for index, case in enumerate(all_cases() if whole else covering_cases()):
        device = install(devices[(index + part) % PARTS])
        device.launches.clear()
        expected = case.run("torch")
        problems = _problems(case, expected, device.seed is not None)
        of_case = {"name": case.name, "target": device.capability, "seed": device.seed, "problems": problems}
        rows.append(of_case | {"launches": len(device.launches)})
        launches += [{"kernel": x.kernel, "constants": x.constants, "grid": x.grid} for x in device.launches]
    return {"rows": rows, "launches": launches, "kernels": sorted(adapter.kernel_names())}


def _programs(device: Device, case: Case, kernel: str) -> Iterator[Program]:
    """The longest variant of a kernel that a call launches."""
    found: dict[int, Program] = {}

    def remember(program: Program) -> Program:
        if program.name == kernel:
            found[id(program)] = program
        return program

    device.change = remember
    case.run("triton")
    device.change = None
    yield max(found.values(), key=lambda program: len(program.code))


def _sample(faults: Iterator[Planted], each: int, kinds: tuple[str, ...] | None) -> list[Planted]:
    """Some of each kind, evenly spread."""
    by_kind: dict[str, list[Planted]] = defaultdict(list)
    for fault in faults:
        if kinds is None or fault.kind in kinds:
            by_kind[fault.kind].append(fault)
    return [fault for some in by_kind.values() for fault in some[:: max(1, len(some) // each)][:each]]


def faults(each: int, sure: bool) -> list[dict[str, Any]]:
    """Faults planted one at a time, and whether a call notices.

    Args:
        each: of a kind, in a kernel.
        sure: those alone that always make a difference.
    """
    device = install(Device(limit=20_000))
    cases = {case.name: case for case in all_cases()}
    rows = []
    for kernel, names in WITNESSES.items():
        for name in names:
            case, expected = cases[name], cases[name].run("torch")
            (program,) = _programs(device, case, kernel)
            kinds = tuple(kind for kind in SURE if kind != UNSURE.get(kernel)) if sure else None
            for fault in _sample(planted(program), each, kinds):
                device.change = lambda x, fault=fault, program=program: fault(x) if x is program else x
                problems = _problems(case, expected)
                device.change = None
                x = program.code[fault.at]
                rows.append(
                    {
                        "kernel": kernel,
                        "call": name,
                        **fault._asdict(),
                        "text": f"{x.where}: {x.text}",
                        "noticed": problems,
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("calls")
    run.add_argument("--part", type=int, default=0)
    run.add_argument("--whole", action="store_true")
    run.add_argument(
        "--check", action="store_true", help="print the calls that differ alone, and fail if there are any"
    )
    run = commands.add_parser("faults")
    run.add_argument("--each", type=int, default=1)
    run.add_argument("--sure", action="store_true")
    args = parser.parse_args()
    adapter.allow_cpu()
    torch.use_deterministic_algorithms(True)  # new memory is NaN: what reads it before it is written shows
    if args.command == "calls" and args.check:
        rows = calls(args.part, args.whole)["rows"]
        wrong = [row for row in rows if row["problems"]]
        print("\n".join([f"{len(rows)} calls, {len(wrong)} differ", *map(str, wrong)]))
        sys.exit(int(bool(wrong)))
    print(json.dumps(calls(args.part, args.whole) if args.command == "calls" else faults(args.each, args.sure)))


if __name__ == "__main__":
    main()
