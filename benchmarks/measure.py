"""Time and memory of one call. Nothing here knows what is being measured."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from vgs_kernels import release_workspace

#: Ends by itself soon after the process that it belongs to.
_SPIN = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for _ in range(1_000_000):\n        pass\n"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection in the middle of something timed."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def seconds(call: Callable[[], None], device: str) -> float:
    """Duration of a call: between two events on a CUDA device, else by the wall clock."""
    with _no_collection():
        if device != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _return_freed_memory() -> None:
    """What is freed, or kept for a later call, goes back to the system, so that using it again counts."""
    gc.collect()
    release_workspace()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_extra_bytes(call: Callable[[], None], device: str) -> int | None:
    """Largest memory in use during a call beyond what is in use before it.

    On CUDA by PyTorch's allocator; on Linux the process's resident memory, which also counts what libraries take for
    themselves; None elsewhere.
    """
    _return_freed_memory()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        _CLEAR.write_text("5")  # resets the peak
    except OSError:
        return None
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


@contextlib.contextmanager
def memory_limit(device: str) -> Iterator[None]:
    """On Linux CPUs, let an allocation beyond the machine's memory fail instead of ending the process."""
    if device == "cuda" or not Path("/proc/meminfo").exists():
        yield
        return
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_resident("VmData") + int(0.95 * available), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@contextlib.contextmanager
def busy_core() -> Iterator[dict[str, float | None]]:
    """Another process keeps one core busy inside; afterwards ``share`` says how much of a core it had."""
    load: dict[str, float | None] = {"share": None}
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-S", "-c", _SPIN, str(os.getpid())])
    try:
        yield load
    finally:
        process.kill()
        _, process.returncode, usage = os.wait4(process.pid, 0)
        load["share"] = (usage.ru_utime + usage.ru_stime) / (time.monotonic() - start)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, cuBLAS, Triton or the system had no memory left."""
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
