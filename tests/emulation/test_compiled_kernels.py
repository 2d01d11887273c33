"""Every Triton kernel as it is compiled for sm_80 and sm_90, executed thread by thread, against the PyTorch rows.

Beside the values, each launch is checked for accesses out of bounds, misaligned addresses, races, barriers that not all
threads reach, and what is read before it is written. Planted faults show that the checks notice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from launch import SUPPORT, launch_once

from tests.emulation.planted import HARMLESS, KINDS

ROOT = SUPPORT.parents[1]
#: A target's soft-cap is applied where it is composed, before this kernel reads it.
NEVER = {("totals_kernel", "TARGET_CAP")}


def emulated(factory: pytest.TempPathFactory, *arguments: str) -> Any:
    """What ``run_kernels`` prints: in a process of its own, where Triton compiles."""

    def launch(folder: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "tests.emulation.run_kernels", *arguments]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
        (folder / "result.json").write_text(run.stdout)

    folder = launch_once(factory, "emulated-" + "-".join(x.strip("-") for x in arguments), launch)
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return emulated(tmp_path_factory, "calls")


@pytest.mark.slow
def test_compiled_kernels_compute_what_pytorch_does(calls):
    rows = calls["rows"]
    assert {(row["target"], row["seed"]) for row in rows} == {(80, None), (90, None), (80, 1), (90, 1)}
    assert not {
        f"{row['name']}, sm_{row['target']}, errors {row['seed']}": row["problems"] for row in rows if row["problems"]
    }


def test_every_call_ran_on_the_device_that_is_said(calls):
    """Not on an earlier one of the same target, whose approximate instructions have other errors."""
    assert all(row["launches"] for row in calls["rows"])


def test_every_kernel_and_every_option_was_executed(calls):
    """A flag that is always the same would leave half of a kernel out."""
    seen: dict[tuple[str, str], set] = defaultdict(set)
    for launch in calls["launches"]:
        for name, value in launch["constants"].items():
            if isinstance(value, bool):
                seen[launch["kernel"], name].add(value)
    assert {launch["kernel"] for launch in calls["launches"]} == set(calls["kernels"])
    assert {name for name, values in seen.items() if values != {False, True}} <= NEVER
    assert any(launch["grid"][1] > 1 for launch in calls["launches"] if launch["kernel"].startswith("statistics"))


@pytest.mark.slow
def test_planted_faults_are_noticed(tmp_path_factory):
    rows = emulated(tmp_path_factory, "faults", "--sure", "--each", "2")
    kinds = {(row["kernel"], row["kind"]) for row in rows}
    assert len(kinds) >= 12 and len({kernel for kernel, _ in kinds}) == 10
    assert not [row for row in rows if not row["noticed"]]
    # Each check has noticed something: wrong numbers, wrong addresses, races.
    noticed = " ".join(row["noticed"][0] for row in rows)
    assert all(word in noticed for word in ("race", "out of bounds", "gradient of", "unwritten"))


@pytest.mark.slow
@pytest.mark.parametrize("part", [1, 2, 3])
def test_the_other_targets_and_errors(tmp_path_factory, part):
    rows = emulated(tmp_path_factory, "calls", "--part", str(part))["rows"]
    assert not {
        f"{row['name']}, sm_{row['target']}, errors {row['seed']}": row["problems"] for row in rows if row["problems"]
    }


@pytest.mark.slow
def test_most_faults_of_any_kind_are_noticed(tmp_path_factory):
    """Each kind at times, and nine in ten of those that seldom make no difference."""
    rows = emulated(tmp_path_factory, "faults", "--each", "3")
    assert len(rows) > 200
    assert {row["kind"] for row in rows if row["noticed"]} == set(KINDS)
    telling = [row for row in rows if row["kind"] not in HARMLESS]
    assert sum(bool(row["noticed"]) for row in telling) >= 0.9 * len(telling)
