"""How sharp the tests are: puts one fault after the other into a copy of the checkout and sees which tests notice.

    python -m tests.mutations check
    python -m tests.mutations run --out after.json --select "not slow"
    python -m tests.mutations table before.json after.json > mutations.md

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .faults import MUTATIONS
from .mutation import Mutation

ROOT = Path(__file__).parents[2]
#: What a copy of the checkout does without.
LEFT_OUT = (".*", "__pycache__", "*.egg-info", "build", "runs", "shared")
#: Outcomes of one run that mean that the fault was noticed.
CAUGHT = ("failed", "crashed", "timed out")


def lines_equal(path: Path, line: str) -> list[int]:
    """Indices of the lines of a file that are this one, whatever their indentation."""
    return [index for index, found in enumerate(path.read_text().splitlines()) if found.strip() == line]


def locate(root: Path, mutation: Mutation) -> tuple[Path, int]:
    """The file and the index of the line that a mutation changes: where it is said to be, else in its package.

    Raises:
        LookupError: the line is not there, or more than once.
    """
    named = root / mutation.file
    places = [(named, index) for index in lines_equal(named, mutation.line)] if named.is_file() else []
    if not places:
        package = root / Path(mutation.file).parts[0]
        places = [(path, index) for path in sorted(package.rglob("*.py")) for index in lines_equal(path, mutation.line)]
    if len(places) != 1:
        raise LookupError(f"{mutation.name}: expected this line once in {mutation.file}, got it {len(places)} times.")
    return places[0]


def apply(root: Path, mutation: Mutation) -> str:
    """Change the line; returns where it was, as ``path:number``."""
    path, index = locate(root, mutation)
    lines = path.read_text().splitlines(keepends=True)
    lines[index] = lines[index].replace(mutation.line, mutation.mutated)
    path.write_text("".join(lines))
    return f"{path.relative_to(root).as_posix()}:{index + 1}"


def targets(root: Path, mutation: Mutation) -> Iterator[Path]:
    """The test files that should notice, as far as they exist; then the folders that hold the rest."""
    for name in mutation.tests:
        yield from sorted((root / "tests").rglob(f"{name}.py"))
    yield from (folder for room in mutation.rooms if (folder := root / "tests" / room).is_dir())


def run_tests(root: Path, target: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run a file or folder up to its first failure; returns the outcome, that test's id, and the seconds it took."""
    command = [options.python, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(target)]
    command += ["-m", options.select] if options.select else []
    # Compiled files are told apart by time and size alone, which a mutation may leave as they are.
    variables = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(root), "COLUMNS": "400"}
    began, output = time.perf_counter(), ""
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(
            command, cwd=root, env={**os.environ, **variables}, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # ranks of a test that hangs or crashes must not live on
            end_group(process.pid)
            process.wait()
        file.seek(0)
        output = file.read()
    seconds = round(time.perf_counter() - began, 1)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+?::.+?|\S+)(?: - .*)?$", output, flags=re.MULTILINE)
    if code in (3, 4) or (code == 2 and not failures):
        sys.exit(f"pytest could not run {target}:\n{output[-3000:]}")
    outcome = {None: "timed out", 0: "passed", 1: "failed", 2: "failed", 5: "no tests"}.get(code, "crashed")
    found = failures[0] if failures else None
    return {"tests": target.relative_to(root).as_posix(), "outcome": outcome, "caught_by": found, "seconds": seconds}


def end_group(leader: int) -> None:
    """Kill what is left of a process group that was started here."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def examine(mutation: Mutation, record: dict[str, Any], options: argparse.Namespace) -> Iterator[None]:
    """Run the targets that the record lacks, up to ``options.files`` of them once one has noticed."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        root = Path(folder) / "checkout"
        shutil.copytree(options.checkout, root, ignore=shutil.ignore_patterns(*LEFT_OUT))
        record["line"] = apply(root, mutation)
        known = {run["tests"] for run in record["runs"]}
        for target in targets(root, mutation):
            count = sum(run["outcome"] in CAUGHT for run in record["runs"])
            if count and (len(record["runs"]) >= options.files or target.is_dir()):
                break
            if target.relative_to(root).as_posix() not in known:
                record["runs"].append(run_tests(root, target, options))
                yield


def run(options: argparse.Namespace) -> None:
    """Examine the mutations, and write down every run as soon as it has ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the tests end as well
    chosen = [m for m in MUTATIONS if not options.only or m.name in options.only]
    check(options.checkout, chosen)
    results = {"select": options.select, "mutations": {}}
    if options.out.exists():
        results = json.loads(options.out.read_text())
        if results["select"] != options.select:
            sys.exit(f"{options.out} has runs of select={results['select']!r}, expected {options.select!r}.")
    for mutation in chosen:
        record = results["mutations"].setdefault(mutation.name, {"line": None, "runs": []})
        for _ in examine(mutation, record, options):
            last = record["runs"][-1]
            where = last["caught_by"] or last["tests"]
            print(f"{mutation.name:36} {last['outcome']:9} {last['seconds']:6.1f} s  {where}", flush=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")


def check(root: Path, mutations: list[Mutation]) -> None:
    """Stop with the names of the mutations whose line is not there."""
    problems = []
    for mutation in mutations:
        try:
            locate(root, mutation)
        except LookupError as error:
            problems.append(str(error))
    if problems:
        sys.exit("\n".join(problems))


def catchers(record: dict[str, Any]) -> list[str]:
    """The tests that noticed, at most one for each run."""
    caught = [run for run in record["runs"] if run["outcome"] in CAUGHT]
    return [run["caught_by"] or f"{run['tests']} ({run['outcome']})" for run in caught]


def table(options: argparse.Namespace) -> None:
    """Print the results side by side, in Markdown: what noticed each mutation, and after how many seconds."""
    columns = [(path.stem, json.loads(path.read_text())["mutations"]) for path in options.results]
    titles = [f"{name}: {title}" for name, _ in columns for title in ("noticed by", "seconds", "also by")]
    print("| Mutation | What it breaks |", *(f"{title} |" for title in titles))
    print("|" + "---|" * (2 + len(titles)))
    for mutation in MUTATIONS:
        cells = [f"`{mutation.name}`", mutation.breaks]
        for _, records in columns:
            record = records.get(mutation.name, {"runs": []})
            found, others = catchers(record)[:1], catchers(record)[1:]
            seconds = 0.0
            for one in record["runs"]:
                seconds += one["seconds"]
                if one["outcome"] in CAUGHT:
                    break
            cells.append(f"`{found[0]}`" if found else "**none**" if record["runs"] else "not run")
            cells += [f"{seconds:.0f}", ", ".join(f"`{Path(test.partition('::')[0]).name}`" for test in others)]
        print("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    for name, records in columns:
        caught = sum(bool(catchers(records.get(mutation.name, {"runs": []}))) for mutation in MUTATIONS)
        print(f"\n{name}: {caught} of {len(MUTATIONS)} noticed.")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="put in every fault and run the tests")
    runner.add_argument("--out", type=Path, required=True, help="JSON file; runs that it holds are not repeated")
    runner.add_argument("--select", default="", help='pytest marks, for example "not slow"; all tests if not given')
    runner.add_argument("--only", nargs="+", choices=[m.name for m in MUTATIONS], metavar="NAME", help="some mutations")
    runner.add_argument("--files", type=int, default=3, help="test files that are asked once one has noticed")
    runner.add_argument("--limit", type=float, default=900, help="seconds for one file or folder")
    runner.add_argument("--python", default=sys.executable)
    checker = commands.add_parser("check", help="look for every line")
    for command in (runner, checker):
        command.add_argument("--checkout", type=Path, default=ROOT)
    writer = commands.add_parser("table", help="compare result files, in Markdown")
    writer.add_argument("results", type=Path, nargs="+")
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    elif options.command == "check":
        check(options.checkout, MUTATIONS)
    else:
        table(options)


if __name__ == "__main__":
    main()
