"""For pytest: tests that are marked ``gpu`` believe in one (``-p tests.emulation.device.plugin``).

python -m tests.emulation.device.build -m pytest -p tests.emulation.device.plugin -m "gpu and not slow"
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch

from ..triton_device import Device, install
from .values import CPUValues, use_no_other_library

_device = Device(kind="cuda", seed=int(os.environ["EMULATION_SEED"]) if "EMULATION_SEED" in os.environ else None)
_executed: Counter[str] = Counter()

#: Tests that no emulation can pass, by a part of their name, and why.
CANNOT = {
    "test_side_stream": "everything has happened when a call returns: no stream is ever busy",
    "test_cuda_graph": "nothing can be captured",
    "test_compute_sanitizer": "it watches a GPU",
    "TestCompile": "torch.compile refuses dispatch modes",
    "test_flex": "FlexAttention compiles for a GPU",
    "test_kernels_in_bfloat16": "FlexAttention and flash attention are no Triton kernels of ours",
    "beyond_2_31": "terabytes of arithmetic",
    "test_running_out_of_memory": "memory is the host's",
    "test_gpu_benchmarks": "no time means anything",
    "test_synchronisation_is_noticed": "PyTorch's own check needs a driver",
}


def pytest_configure() -> None:
    use_no_other_library()
    install(_device)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in CANNOT.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"not emulated: {reason}"))


@pytest.fixture(autouse=True)
def values():
    """Values on the device, and what was executed there."""
    _device.launches.clear()
    with CPUValues():
        yield
    torch.cuda.empty_cache()  # it is the host's memory
    for launch in _device.launches:
        _executed["launches"] += 1
        _executed["instructions of threads"] += sum(launch.counts.instructions.values())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"executed as compiled: {dict(_executed)}")
