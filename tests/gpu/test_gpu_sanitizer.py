"""The kernels under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from problems import DEVICE

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]


#: Every variant of the row kernels, on aligned rows and on others, launched alone: racecheck is not to judge cuBLAS.
KERNELS_SCRIPT = """
import itertools
import torch
from benchmarks.kernels import KERNELS
from vgs_kernels.rows import entries_triton, rows_triton
from vgs_kernels.rows.layout import LogitTransform, RowCoefficients, RowTile, new_state

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
N, V = 33, 1003
cases = [(kernel, *x) for kernel in ("statistics_kernel", "gradient_kernel") for x in KERNELS[kernel].variants]
for (kernel, options, logits, gradient), width in itertools.product(cases, (V, 1024)):
    count = 4 if options["FOUR"] else 2
    rows = [torch.randn(N, width, device=DEVICE).to(DTYPES[logits])[:, :V] for _ in range(count)]
    caps = [LogitTransform(softcap=9.0 if options.get(name) else None) for name in ("STUDENT_CAP", "TARGET_CAP")]
    tile = RowTile(*rows, *[None] * (4 - len(rows)), *caps, options.get("MASKED", True), width)
    state = new_state(N, tile.four, rows[0].float())
    rows_triton.statistics(tile, state)
    if kernel == "gradient_kernel" and options["FOUR"]:
        out = torch.zeros(N, width, dtype=DTYPES[gradient], device=DEVICE)[:, :V]
        text = torch.zeros(N, width, dtype=out.dtype, device=DEVICE)[:, :V] if options["PRIOR"] else None
        policy = (torch.rand(N, device=DEVICE), torch.arange(N, device=DEVICE)) if options["POLICY"] else ()
        coefficients = RowCoefficients(*torch.rand(2, N, device=DEVICE), None, options["PRIOR"], *policy)
        entries_triton.gradient(tile, state, None, coefficients, out, text)
        assert out.any() and (text is None or text.any())
"""

#: The same through the public functions, with their slabs, blocks and offsets.
LOSS_SCRIPT = """
import torch
from vgs_kernels import VGSObjective, fused_linear_vgs_loss, vgs_loss

N, V, D = 33, 1003, 24
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    s, a, t, w = (torch.randn(N, D, device=DEVICE).to(dtype) for _ in range(4))
    student, teacher = (torch.randn(V, D, device=DEVICE).to(dtype) for _ in range(2))
    inputs = [s.requires_grad_(), a.requires_grad_(), student.requires_grad_(), t, w, teacher]
    for objective in (
        VGSObjective(lam=0.1), VGSObjective(lam=0.1, schedule="adaptive"), VGSObjective(lam=0.1, detach_prior=False)
    ):
        for cap in (None, 9.0):
            for size in (2**30, 2**18):
                options = {"student_softcap": cap, "teacher_softcap": cap, "workspace_bytes": size}
                fused_linear_vgs_loss(*inputs, objective=objective, **options).loss.backward()
        vgs_loss(s @ student.T, a @ student.T, t @ teacher.T, w @ teacher.T, objective=objective).loss.backward()
    assert s.grad.isfinite().all() and student.grad.isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "script"),
    [
        pytest.param("memcheck", KERNELS_SCRIPT, id="memcheck-kernels"),
        pytest.param("memcheck", LOSS_SCRIPT, id="memcheck-loss"),
        pytest.param("racecheck", KERNELS_SCRIPT, id="racecheck-kernels"),
    ],
)
def test_compute_sanitizer(tool, script):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # every tensor an allocation of its own, whose end the tool knows
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = f"DEVICE = {DEVICE!r}\n{script}\nif DEVICE == 'cuda':\n    torch.cuda.synchronize()\n"
    # PyTorch and Triton ask the driver for symbols that it may lack: what counts is what the kernels do
    quiet = ["--report-api-errors", "no"] if tool == "memcheck" else []
    run = subprocess.run(
        [sanitizer, "--tool", tool, *quiet, "--error-exitcode", "86", sys.executable, "-c", code],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert run.returncode == 0, (run.returncode, run.stdout[-3000:], run.stderr[-3000:])
