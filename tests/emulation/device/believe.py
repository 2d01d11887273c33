"""Runs a module as if there were a GPU that does everything at once: allocations, checks and launches are real, but
only small tensors have values, so that even the largest call takes no time and no memory. With ``--values`` all have,
and Triton's kernels are executed.

    python -m tests.emulation.device.build -m tests.emulation.device.believe [--values] MODULE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys

from ..triton_device import Device, install
from .record import move_at_most
from .values import CPUValues, use_no_other_library

#: Elements: token ids, indices, lengths and scalars, on which a program's way depends.
_SMALL = 1 << 17


def main() -> None:
    values = sys.argv[1] == "--values"
    install(Device(kind="cuda", execute=values))
    use_no_other_library()
    if not values:
        move_at_most(8 * _SMALL)
    sys.argv = sys.argv[2 if values else 1 :]
    with CPUValues(float("inf") if values else _SMALL):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
