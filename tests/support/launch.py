"""Starts a worker on several gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent


def torchrun(worker: Path, ranks: int, *arguments: str, timeout: float = 300, **environment: str) -> None:
    """Runs ``worker`` with ``torchrun`` and one thread each; a rank that fails, or the clock, fails the caller.

    Args:
        worker: a script of this folder.
        ranks: processes.
        *arguments: of the script.
        timeout: seconds.
        **environment: variables beside those of this process.
    """
    paths = [str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    done = subprocess.run(
        [*command, str(worker), *arguments], env=variables, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-6000:]
