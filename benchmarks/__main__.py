"""The benchmark suite.

loss      time, memory and gradient error of the losses: ours, every peer, the floor
kernels   what every Triton kernel takes on real GPU targets, compiled ahead of time (no GPU needed)
counts    FLOPs and bytes of the floors, by count
step      a whole training step
report    a result file as tables and pictures
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .results import Results


def _loss(args: argparse.Namespace) -> int:
    import torch

    from .jobs import JOBS
    from .loss import PLANS, Cell, run
    from .measure import busy_core
    from .methods import EXACT, METHODS
    from .report import summary, tables
    from .results import Results, environment
    from .rows import Inputs, read_notes

    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    known = None
    if args.rows is not None:
        if args.shape is not None or args.entropy is not None:
            raise ValueError("--rows has a shape and an entropy of its own: leave out --shape and --entropy.")
        known = read_notes(args.rows)["tokens"]
        if max(args.tokens or [0]) > known:
            raise ValueError(f"--tokens must be at most {known}, the tokens of {args.rows}, got {max(args.tokens)}.")
    inputs = Inputs(device, dtype, args.entropy, None if known is None else str(args.rows.resolve()))
    if args.shape is None and args.tokens is None and known is None:
        jobs, methods = set(args.jobs or JOBS), set(args.methods or METHODS)
        cells = [
            Cell(
                *(cell.shape, cell.tokens),
                tuple(job for job in cell.jobs if job in jobs),
                tuple(method for method in cell.methods if method in methods),
            )
            for cell in PLANS["gpu" if device == "cuda" else "cpu"]
        ]
    else:
        shape = args.shape or ("8b-2b" if device == "cuda" else "cpu") if known is None else args.rows.stem
        cells = [
            Cell(
                shape,
                tokens,
                tuple(args.jobs or JOBS),
                tuple(args.methods or (EXACT if args.entropy is None and known is None else METHODS)),
            )
            for tokens in args.tokens or [known or 512]
        ]
    results = Results(args.out, environment(device, args.commit))
    rounds = args.rounds or (3 if args.first_call else 20)
    with contextlib.ExitStack() as stack:
        if args.busy_core:
            results.environment["load"] = stack.enter_context(busy_core())
        for rows in run(cells, results, inputs, rounds=rounds, deadline=deadline, first_call=args.first_call):
            part = Results(None, results.environment)
            part.rows = rows
            print(f"\n{tables(part)}\n", flush=True)
    results.save()
    print(summary(results))
    return 0


def _kernels(args: argparse.Namespace) -> int:
    from .kernels import lines, report

    rows = report(args.targets)
    print(json.dumps(rows) if args.json else "\n".join(lines(rows)))
    return int(any(row["spills"] for row in rows))


def _counts(args: argparse.Namespace) -> int:
    from .counts import tables, workspaces

    ceilings = args.tokens, args.tflops * 1e12, args.terabytes * 1e12
    print(f"{tables(*ceilings)}\n\n{workspaces(args.shape, *ceilings)}")
    return 0


def _step(args: argparse.Namespace) -> int:
    import torch

    from .step_report import computed, tables

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.count or (device == "cpu" and args.toy is None):
        print(computed(args.pairs, args.tflops * 1e12, args.terabytes * 1e12, args.gibibytes * 2**30))
        if args.plots is not None:
            _save_steps(args.plots, None, args.pairs)
        return 0
    from .results import Results, environment
    from .step import PLANS, run

    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    toy = f"{args.toy}-{args.family}" if args.toy and args.family else args.toy
    cells = PLANS[toy or "gpu"]
    if args.toy is None:
        cells = [cell for cell in cells if cell.pair in (*args.pairs, "8b-8b")]
    dtype = torch.float32 if args.toy else torch.bfloat16
    results = Results(args.out, environment(device, args.commit))
    for rows in run(cells, results, device, dtype, rounds=args.rounds, deadline=deadline):
        part = Results(None, results.environment)
        part.rows = rows
        print(f"\n{tables(part)}\n", flush=True)
    if args.plots is not None:
        _save_steps(args.plots, results, args.pairs)
    return 0


def _save_steps(folder: Path, results: Results | None, pairs: Sequence[str]) -> None:
    """Write the picture of a result's steps, or of computed ones."""
    from .plots import stacked_phases
    from .report import describe
    from .step_report import panels

    folder.mkdir(parents=True, exist_ok=True)
    caption = "computed, not measured" if results is None else describe(results.environment)
    label = "TFLOP by count" if results is None else "seconds, median of each phase"
    path = folder / ("step-counts.png" if results is None else "step.png")
    stacked_phases(panels(results, pairs), label, caption).savefig(path, dpi=130)
    print(path, file=sys.stderr)


def _report(args: argparse.Namespace) -> int:
    from .report import markdown, summary
    from .results import Results

    results = Results.load(args.result)
    if results.environment.get("suite") == "step":
        from .step_report import markdown as steps

        print(steps(results))
        if args.plots is not None:
            _save_steps(args.plots, results, ())
        return 0
    print(summary(results) if args.short else markdown(results))
    if args.plots is not None:
        try:
            from .plots import save_all
        except ImportError as error:
            print(f"No pictures: {error}", file=sys.stderr)
            return 1
        for path in save_all(results, args.plots):
            print(path, file=sys.stderr)
    return 0


def _compare(paths: list[Path]) -> int:
    from .report import compare
    from .results import Results

    print(compare(*(Results.load(path) for path in paths)))
    return 0


def _parser() -> argparse.ArgumentParser:
    from .jobs import JOBS
    from .methods import METHODS
    from .problem import SHAPES

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="one result against another"
    )
    commands = parser.add_subparsers()

    loss = commands.add_parser("loss", help="without --shape and --tokens: the plan for this device")
    loss.add_argument("--shape", choices=SHAPES)
    loss.add_argument("--tokens", type=int, nargs="+", help="tokens N of a call")
    loss.add_argument("--jobs", nargs="+", choices=JOBS)
    loss.add_argument("--entropy", type=float, metavar="NATS", help="rows of this entropy, with a real model's tails")
    loss.add_argument("--rows", type=Path, metavar="FILE", help="rows of `vgs capture` instead of synthetic ones")
    loss.add_argument("--methods", nargs="+", choices=METHODS)
    loss.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on CUDA, else float32"
    )
    loss.add_argument("--device", choices=("cpu", "cuda"))
    loss.add_argument(
        "--rounds", type=int, help="timed calls of each method at most, 3 at least (20); fresh processes (3)"
    )
    loss.add_argument("--first-call", action="store_true", help="every call is the first of a fresh process")
    loss.add_argument("--busy-core", action="store_true", help="beside a process that keeps one core busy")
    loss.add_argument("--minutes", type=float, help="start nothing new after this long")
    loss.add_argument("--commit", help="for the result file, where the checkout is not a git repository")
    loss.add_argument("--out", type=Path, help="result file, written as rows come in")
    loss.set_defaults(run=_loss)

    kernels = commands.add_parser("kernels", help="fails on a spill")
    kernels.add_argument("--targets", nargs="*", help="sm_80, sm_90, sm_100, gfx942 (default: all)")
    kernels.add_argument("--json", action="store_true")
    kernels.set_defaults(run=_kernels)

    counts = commands.add_parser("counts")
    counts.add_argument("--tokens", type=int, default=8192)
    counts.add_argument("--shape", choices=SHAPES, default="8b-2b", help="of the table of workspaces")
    counts.add_argument("--tflops", type=float, default=790, help="a large bf16 product; default: seen on an H200")
    counts.add_argument(
        "--terabytes", type=float, default=4.3, help="per second, a large copy; default: seen on an H200"
    )
    counts.set_defaults(run=_counts)

    step = commands.add_parser("step", help="without a CUDA device, --small or --medium: computed from counts")
    toy = step.add_mutually_exclusive_group()
    for name, about in (("small", "seconds"), ("medium", "a sixteenth of the lengths, minutes on a CPU")):
        about = f"toy models, measured wherever this runs: {about}"
        toy.add_argument(f"--{name}", dest="toy", action="store_const", const=name, help=about)
    step.add_argument(
        "--family", choices=("qwen3.5", "gemma4"), help="text stack of the toy models; default: that of Qwen3-VL"
    )
    step.add_argument("--count", action="store_true", help="computed, even where it could be measured")
    pairs = ("8b-2b", "8b-4b", "qwen3.5-9b-4b", "gemma4-12b-e4b")
    step.add_argument("--pairs", nargs="+", choices=pairs, default=pairs[:2], help="the last two: counted alone")
    step.add_argument("--rounds", type=int, default=3, help="timed steps of each method")
    step.add_argument("--minutes", type=float, help="start nothing new after this long")
    step.add_argument("--commit", help="for the result file, where the checkout is not a git repository")
    step.add_argument("--out", type=Path, help="result file, written after every cell")
    step.add_argument("--plots", type=Path, metavar="FOLDER", help="write a picture there")
    step.add_argument("--tflops", type=float, default=494.5, help="assumed by computed times: half an H200's peak")
    step.add_argument("--terabytes", type=float, default=4.3, help="per second, assumed by computed times")
    step.add_argument("--gibibytes", type=float, default=132, help="of memory that computed parts must fit into")
    step.set_defaults(run=_step)

    report = commands.add_parser("report")
    report.add_argument("result", type=Path)
    report.add_argument("--plots", type=Path, metavar="FOLDER", help="write pictures there")
    report.add_argument("--short", action="store_true", help="one line a cell")
    report.set_defaults(run=_report)
    return parser


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    try:
        if args.compare is not None:
            return _compare(args.compare)
        if not hasattr(args, "run"):
            parser.error("name a command, or --compare two result files")
        return args.run(args)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
