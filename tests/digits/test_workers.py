"""Processes of the demo and the studies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, time
from vgs.digits.workers import workers

def job(path):
    open(path, "w").write(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    with workers(2) as spread:
        spread(job, [(path,) for path in sys.argv[1:]])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of POSIX")
def test_workers_end_with_the_process_that_made_them(tmp_path: Path) -> None:
    script, marks = tmp_path / "script.py", [tmp_path / "one", tmp_path / "two"]
    script.write_text(SCRIPT)
    parent = subprocess.Popen([sys.executable, script, *marks])
    try:
        wait_for(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not any(alive(int(mark.read_text())) for mark in marks))


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
