"""Starts workers on several gloo ranks, once for all that want their results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

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


def launch_once(factory: pytest.TempPathFactory, name: str, launch: Callable[[Path], None]) -> Path:
    """The folder of a launch's results. Of several processes of pytest, the first to come launches; the others wait,
    and fail as it did.

    Args:
        factory: pytest's.
        name: of the launch.
        launch: leaves the results in a folder.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / name
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            try:
                launch(folder)
            except BaseException as error:
                (folder / "failure").write_text(str(error))
                raise
    assert not (folder / "failure").exists(), (folder / "failure").read_text()
    return folder


def wanted(request: pytest.FixtureRequest, argument: str = "name") -> list[str]:
    """The values of a parameter in the selected tests of a module that use its fixture, which asks, in order."""
    items = [x for x in request.session.items if x.path == request.path and request.fixturename in x.fixturenames]
    return list(dict.fromkeys(item.callspec.params[argument] for item in items))
