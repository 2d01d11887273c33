"""Runs examples/liger.py with Liger's kernels interpreted, and keeps what it asked of ``vgs_step``.

    python tests/support/liger_example.py WORDS ...

Leaves calls, losses and the names of the student's layers in ``liger.pt`` in the working directory.
"""

from __future__ import annotations

import sys
from unittest import mock

import liger_interpreter  # noqa: F401  first of all
import torch
from example_runs import Recorder, run_example

import vgs

if __name__ == "__main__":
    with mock.patch.object(vgs, "vgs_step", Recorder()) as recorder:
        student = run_example("liger.py", *sys.argv[1:])["student"]
    layers = {type(x).__name__ for x in student.modules()}
    torch.save({"calls": recorder.calls, "losses": recorder.losses, "layers": layers}, "liger.pt")
