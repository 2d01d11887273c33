"""A device for Triton that executes what is compiled for a GPU, thread by thread, on the CPU.

Triton's own JIT compiles a kernel as it would on the GPU, with the same specialisations, down to PTX; ptxas alone is
left out. The launch then runs ``machine.Machine`` on the memory of the tensors that it was given.

It must not be mixed with Triton's interpreter (``TRITON_INTERPRET``), which replaces kernels when they are defined:
install it in a process of its own, before a kernel is launched.
"""

from __future__ import annotations

import atexit
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver

from .machine import Counts, Machine
from .memory import GlobalMemory
from .ptx import Program, parse

#: Bytes of shared memory that a block may have.
MAX_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
MAX_THREADS, MAX_GRID = 1024, (2**31 - 1, 65_535, 65_535)


class Launch(NamedTuple):
    """One launch of a kernel: which, its compile-time arguments, its grid, and what it executed."""

    kernel: str
    constants: dict[str, Any]
    grid: tuple[int, int, int]
    counts: Counts | None


class BadLaunch(Exception):
    """A launch that a driver would refuse."""


@dataclass
class Device:
    """What the driver does with launches.

    Attributes:
        capability: compute capability times ten.
        kind: device type of the tensors that kernels may be given.
        change: applied to every kernel before it is launched.
        limit: instructions after which a kernel does not end, see ``Machine``.
        seed: of the errors of approximate instructions; None for results that are rounded to nearest.
        execute: False to record launches alone.
        launches: of all kernels, in their order.
        loaded: names of the kernels that were loaded, one for each compilation.
    """

    capability: int = 90
    kind: str = "cpu"
    change: Callable[[Program], Program] | None = None
    limit: int = 1_000_000
    seed: int | None = None
    execute: bool = True
    launches: list[Launch] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)


def _ptx_alone(*stages: Any) -> tuple[str, str] | None:
    """Triton's hook into its stages of compilation: what is loaded is the PTX itself."""
    if not stages:  # asked for the part of the cache's key
        return "executed as PTX", "executed as PTX"
    stages[1]["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


class _Utils:
    """What Triton asks a driver for."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED[self._device.capability], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name: str, binary: bytes, shared: int, index: int) -> tuple[Any, ...]:
        self._device.loaded.append(name)
        program = parse(binary.decode())
        return program, program, 0, 0, MAX_THREADS

    def unload_module(self, module: Any) -> None:
        pass


def _bits(value: Any, kind: str, device: Device) -> int:
    """An argument as the kernel's parameter holds it."""
    if kind.startswith("*"):
        if value.device.type != device.kind:
            raise BadLaunch(f"a pointer to {value.device} memory was given to a kernel on {device.kind}.")
        return value.data_ptr()
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", value))[0]
    if kind == "fp64":
        return struct.unpack("<Q", struct.pack("<d", value))[0]
    width = int(kind.lstrip("iu"))
    lowest, highest = (0, 2**width) if kind[0] == "u" else (-(2 ** (width - 1)), 2 ** (width - 1))
    if not lowest <= int(value) < highest:
        raise BadLaunch(f"{value} does not fit into {kind}.")
    return int(value) % 2**width


class _Launcher:
    """Launches one compiled kernel."""

    def __init__(self, device: Device, source: Any, metadata: Any) -> None:
        self._device, self._metadata = device, metadata
        self._kinds = list(source.signature.values())
        self._name = source.fn.__name__
        names = source.fn.arg_names
        self._constants = {names[path[0]]: value for path, value in source.constants.items()}

    def __call__(self, x: int, y: int, z: int, stream: Any, program: Program, *others: Any) -> None:
        arguments = others[4:]  # behind packed metadata, launch metadata and two hooks
        grid, device = (x, y, z), self._device
        if device.change is not None:
            program = device.change(program)
        if not all(0 < size <= most for size, most in zip(grid, MAX_GRID, strict=True)):
            raise BadLaunch(f"a grid of {grid} is not between 1 and {MAX_GRID}.")
        if program.threads != 32 * self._metadata.num_warps:
            raise BadLaunch(f"{program.threads} threads are compiled, {self._metadata.num_warps} warps launched.")
        given = [(value, kind) for value, kind in zip(arguments, self._kinds, strict=True) if kind != "constexpr"]
        values = [_bits(value, kind, device) for value, kind in given]
        values += [0] * (len(program.parameters) - len(values))  # Triton's scratch memory, of which we have none
        counts = None
        if device.execute:
            memory = GlobalMemory([value.untyped_storage() for value, kind in given if kind.startswith("*")])
            machine = Machine(program, grid, values, memory, self._metadata.shared, device.seed, device.limit)
            counts = machine.run()
        device.launches.append(Launch(self._name, self._constants, grid, counts))


class EmulatedDriver(GPUDriver):
    """Triton's driver for a ``Device``."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self.utils = _Utils(device)
        self.launcher_cls = lambda source, metadata: _Launcher(device, source, metadata)
        if device.kind == "cpu":
            # What Triton has compiled it keeps by this number, with the device that launches it.
            self.get_current_device = lambda: device.capability + 1000 * (0 if device.seed is None else 1 + device.seed)
            self.get_current_stream = lambda index: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._device.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device(self._device.kind, 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def install(device: Device) -> Device:
    """Let Triton compile for ``device`` and launch there, in this process.

    Raises:
        RuntimeError: while Triton interprets.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton interprets its kernels (TRITON_INTERPRET); none would be compiled.")
    triton.knobs.runtime.add_stages_inspection_hook = _ptx_alone
    triton.runtime.driver.set_active(EmulatedDriver(device))
    if device.kind == "cuda":
        # PyTorch's thread for backward passes lets go of the last graph after ``backward`` has returned, which takes
        # Python's lock: on a busy machine it has come too late once, and a process that had done all was aborted.
        atexit.register(time.sleep, 1.0)
    return device
