"""Twelve minutes on an H100 or H200: exactness first, then the losses, then training steps, then a table beside what
was predicted. Every stage is a process of its own, writes as it goes, and cannot take the next one's time.

    python -m benchmarks.session --out FOLDER [--commit COMMIT]
    python -m benchmarks.session --out FOLDER --rehearse    # without a GPU: every command, nothing computed

``FOLDER`` then holds ``session.json``, the log and the result file of each stage, and ``table.md``. Commit it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PREDICTED = ROOT / "benchmarks/results/predicted/times.json"
MINUTES = 12.0
#: Seconds before the end that are kept for the table.
_RESERVE = 15.0
#: Runs a module on the stand-in device of tests/emulation.
_BELIEVE = ("-m", "tests.emulation.device.build", "-m", "tests.emulation.device.believe")
_PLUGIN = ("-m", "tests.emulation.device.build", "-m", "pytest", "-p", "tests.emulation.device.plugin")
#: What exactness is believed from: values and gradients of every objective, and what only a device can get wrong.
_EXACT = (
    *("tests/gpu/test_gpu_values.py", "tests/kernels/test_loss_gradients.py", "tests/kernels/test_loss_half.py"),
    *("tests/kernels/test_divergence_family.py", "tests/gpu/test_gpu_launches.py"),
)
_REHEARSED = "tests/kernels/test_loss_folded.py"


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of its files.
        command: behind ``python``.
        share: of the session's time, at most.
        needs: packages without which it is left out.
    """

    name: str
    command: tuple[str, ...]
    share: float
    needs: tuple[str, ...] = ("torch",)


def stages(out: Path, commit: str | None, minutes: float, rehearse: bool) -> list[Stage]:
    """What is run, in this order; a rehearsal takes the same ways with fewer methods, tests and sizes."""
    revision = ("--commit", commit) if commit else ()
    tests, loss, step = 0.25, 0.42, 0.28
    exact = ("-m", "pytest", "-m", "gpu and not slow", "-q", "-rf", "-p", "no:cacheprovider", *_EXACT)
    losses = ("loss", "--device", "cuda", "--minutes", f"{minutes * loss - 0.4:.2f}", "--out", str(out / "losses.json"))
    steps = ("step", "--minutes", f"{minutes * step - 0.4:.2f}", "--out", str(out / "steps.json"))
    if rehearse:
        exact = (*_PLUGIN, *exact[2 : -len(_EXACT)], _REHEARSED)
        methods = ("--methods", "ours", "eager", "checkpointed", "trl", "liger-jsd", "liger-kl")
        losses = (
            *_BELIEVE,
            "benchmarks",
            *losses,
            "--shape",
            "8b-2b",
            "--tokens",
            "8192",
            "--jobs",
            "vgs",
            "jsd",
            *methods,
        )
        steps = (*_BELIEVE, "--values", "benchmarks", *steps, "--small")
    else:
        losses, steps = ("-m", "benchmarks", *losses), ("-m", "benchmarks", *steps, "--pairs", "8b-2b")
    return [
        Stage("exactness", exact, tests, ("torch", "pytest", "hypothesis")),
        Stage("losses", (*losses, *revision), loss, ("torch", "triton", "tqdm")),
        Stage("steps", (*steps, *revision), step, ("torch", "triton", "tqdm", "transformers")),
    ]


def missing(packages: Sequence[str]) -> list[str]:
    """Those that cannot be imported."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def run(stage: Stage, out: Path, seconds: float) -> dict[str, Any]:
    """Run a stage for so long at most; what it prints goes to its log and to the terminal."""
    absent = missing(stage.needs)
    if absent:
        return {"stage": stage.name, "status": f"left out: {', '.join(absent)} missing", "seconds": 0.0}
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])}
    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else f"failed with exit status {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = f"stopped after {seconds:.0f} s"
    return {"stage": stage.name, "status": status, "seconds": round(time.monotonic() - start, 1)}


def _save(path: Path, content: Any) -> None:
    """Whole at any moment."""
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def failed_rows(path: Path) -> list[str]:
    """What a result file says of methods that did not end well: such a stage ends well all the same."""
    if not path.exists():
        return []
    rows = json.loads(path.read_text())["rows"]
    return [f"{row['job']}, {row['method']}: {row['status']}" for row in rows if row["status"] != "ok"]


def _measured(path: Path, predicted: dict[str, Any]) -> tuple[str, dict[str, dict[str, float]]]:
    """Name of the device, and median seconds by job and method at the size of the predictions."""
    from .results import Results, median

    results = Results.load(path)
    found: dict[str, dict[str, float]] = {}
    for row in results.rows:
        time_taken = median(row)
        same = all(row[name] == predicted[name] for name in ("shape", "tokens", "dtype"))
        if same and time_taken is not None:
            found.setdefault(row["job"], {})[row["method"]] = time_taken
    return results.environment.get("device_name", ""), found


def table(path: Path, predicted: dict[str, Any]) -> str:
    """Measured times beside the predicted ones, and the best peer's."""
    from .report import table as markdown

    device, found = _measured(path, predicted)
    title = next((name for name in predicted["devices"] if name in device), "H200")
    expected = predicted["devices"][title]
    rows = []
    for job, methods in found.items():
        ours, floor = methods.get("ours"), methods.get("floor")
        peers = {name: x for name, x in methods.items() if name not in ("ours", "floor")}
        best = min(peers, key=peers.get, default=None)
        model = expected.get(job, {}).get("ours", {}).get("seconds")
        rows.append(
            [
                job,
                "" if ours is None else f"{1e3 * ours:.1f}",
                "" if model is None else f"{1e3 * model:.1f}",
                "" if ours is None or model is None else f"{ours / model:.2f}",
                "" if ours is None or floor is None else f"{floor / ours:.2f}",
                "" if best is None else f"{1e3 * peers[best]:.1f} ({best})",
            ]
        )
    head = [
        "loss",
        "ours, ms",
        f"predicted for an {title}, ms",
        "measured / predicted",
        "floor / ours",
        "best peer, ms",
    ]
    size = f"{predicted['shape']}, {predicted['tokens']:,} tokens, {predicted['dtype']}"
    return f"{device or 'unknown device'}; {size}\n\n{markdown(head, rows)}\n"


def session(out: Path, commit: str | None, minutes: float, rehearse: bool) -> int:
    """Run all stages; returns how many did not end well.

    Args:
        out: folder of the results.
        commit: for the result files, where the checkout is not a git repository.
        minutes: for everything.
        rehearse: on the stand-in device.
    """
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    end = time.monotonic() + 60 * minutes
    done: list[dict[str, Any]] = []
    for stage in stages(out, commit, minutes, rehearse):
        left = end - time.monotonic() - _RESERVE
        if left <= 0:
            done.append({"stage": stage.name, "status": "not reached", "seconds": 0.0})
        else:
            print(f"{stage.name}: at most {min(left, 60 * minutes * stage.share):.0f} s", flush=True)
            done.append(run(stage, out, min(left, 60 * minutes * stage.share)))
        done[-1]["failed_rows"] = failed_rows(out / f"{stage.name}.json")
        print(f"{stage.name}: {done[-1]['status']}, {done[-1]['seconds']} s", *done[-1]["failed_rows"], sep="\n  ")
        _save(out / "session.json", {"minutes": minutes, "rehearsal": rehearse, "stages": done})
    try:
        text = table(out / "losses.json", json.loads(PREDICTED.read_text()))
    except (OSError, ValueError) as error:
        text = f"No table: {error}\n"
    (out / "table.md").write_text(text)
    print(f"\n{text}")
    return sum(stage["status"] != "ok" for stage in done)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.session", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--commit", help="for the result files, where the checkout is not a git repository")
    parser.add_argument("--rehearse", action="store_true", help="on the stand-in device of tests/emulation")
    args = parser.parse_args()
    return session(args.out, args.commit, args.minutes, args.rehearse)


if __name__ == "__main__":
    sys.exit(main())
