"""Every kernel compiles to machine code of real GPUs and spills nothing. The interpreter accepts code that a compiler
rejects, and it must be off while compiling: hence a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from launch import SUPPORT

ROOT = SUPPORT.parents[1]
#: Kernels that read no rows of logits.
OTHERS = {"merge_kernel", "slots_kernel", "row_sums_kernel", "thresholds_kernel", "below_kernel"}
OTHERS |= {"pick_kernel", "token_scalars_kernel"}
KERNELS = {"statistics_kernel", "gradient_kernel", "totals_kernel", *OTHERS}
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


def compiled(*command: str) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(SUPPORT), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def assert_lean(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["spills"] == 0, row
        if row["kernel"] in OTHERS:
            continue
        assert 0 < row["token_bytes"] < 4e6 and row["token_flops"] > 1e6, row
        if row["logits"] == "fp32" and row["aligned"]:  # 16-byte loads of every logit row
            assert row["wide_loads"] >= (4 if row["options"].get("FOUR") else 2), row


@pytest.mark.slow
def test_every_pair_of_options_compiles_without_spills():
    rows = compiled(str(SUPPORT / "compile_kernels.py"))
    assert {(row["kernel"], row["target"]) for row in rows} == {(k, target) for k in KERNELS for target in TARGETS}
    assert_lean(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_kernels_compile_without_spills(target):
    rows = compiled("-m", "benchmarks", "kernels", "--json", "--targets", target)
    assert {row["kernel"] for row in rows} == KERNELS
    assert_lean(rows)
