"""`python -m benchmarks kernels`: what every Triton kernel takes on real GPU targets, compiled ahead of time.
`python -m benchmarks loss`: time of the fused loss beside eager PyTorch and the bare matrix products."""

from __future__ import annotations

import argparse
import json
import sys


def _kernels(args: argparse.Namespace) -> int:
    from .kernels import report

    rows = report(args.targets)
    if args.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            on = " ".join(key for key, value in row["options"].items() if value)
            print(
                f"{row['target']:7} {row['kernel']:18} {row['logits']}->{row['gradient']} {on:38} "
                f"{row['registers']:4} registers, {row['spills']} spills, {row['shared_bytes']} B shared, "
                f"{row['wide_loads']}/{row['loads']} wide loads"
            )
    return int(any(row["spills"] for row in rows))


def _loss(args: argparse.Namespace) -> int:
    import torch

    from vgs_kernels import VGSObjective

    from .loss import Problem, measure

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    problem = Problem.make(args.tokens, args.vocab, args.student_size, args.teacher_size, dtype, device)
    seconds = measure(problem, VGSObjective(), args.repeats)
    print(
        f"N {args.tokens}, V {args.vocab}, Ds {args.student_size}, Dt {args.teacher_size}, {dtype}, {device}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for name, value in seconds.items():
        ratios = f"{value / seconds['floor']:8.2f} x floor {value / seconds['eager']:8.2f} x eager"
        print(f"{name:6} {value:8.3f} s {ratios}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    kernels = commands.add_parser("kernels")
    kernels.add_argument("--targets", nargs="*", help="sm_80, sm_90, sm_100, gfx942 (default: all)")
    kernels.add_argument("--json", action="store_true")
    kernels.set_defaults(run=_kernels)
    loss = commands.add_parser("loss")
    for name, default in (("tokens", 256), ("vocab", 151_936), ("student-size", 512), ("teacher-size", 1024)):
        loss.add_argument(f"--{name}", type=int, default=default)
    loss.add_argument("--repeats", type=int, default=3)
    loss.set_defaults(run=_loss)
    args = parser.parse_args()
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
