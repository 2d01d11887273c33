"""Runs a module as if there were a GPU that does everything at once: allocations, checks and launches are real, and
nothing is computed.

    python -m tests.emulation.device.build -m tests.emulation.device.believe MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys

from ..triton_device import Device, install
from .record import move_bytes


def main() -> None:
    install(Device(kind="cuda", execute=False))
    move_bytes(False)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
