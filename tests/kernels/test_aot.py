"""Every kernel compiles to machine code of real GPUs and spills nothing. The interpreter accepts code that a compiler
rejects, and it must be off while compiling: hence a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_without_spills(target):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "kernels", "--json", "--targets", target],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(run.stdout)
    sweeps = {"statistics_kernel", "meet_kernel", "gradient_kernel", "totals_kernel", "entry_gradient_kernel"}
    assert {row["kernel"] for row in rows} == sweeps
    for row in rows:
        assert row["spills"] == 0, row
        if row["kernel"] == "meet_kernel":
            continue
        assert 0 < row["token_bytes"] < 4e6 and row["token_flops"] > 1e6, row
        if row["logits"] == "fp32" and row["aligned"]:  # 16-byte loads of every logit row
            assert row["wide_loads"] >= (4 if row["options"].get("FOUR") else 2), row
