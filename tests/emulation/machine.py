"""Executes a kernel: all threads of all blocks together, one instruction at a time, in NumPy.

Threads that take different ways are brought together again where their ways meet: those that are furthest behind go
first. Blocks advance together too; what would depend on their order on a GPU is found by ``memory.AccessLog``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .floats import Approximation
from .instructions import executor
from .memory import Fault, GlobalMemory, SharedMemory, Threads
from .ptx import Instruction, Program
from .registers import Registers

_END = 1 << 30
_CONTROL = ("bra", "bar", "barrier", "ret", "exit", "nop")


@dataclass
class Counts:
    """What a launch executed.

    Attributes:
        instructions: by opcode, for each thread that was active.
        loaded, stored: bytes of global memory. What neighbouring threads of a warp load from one place counts once.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    loaded: int = 0
    stored: int = 0


class Machine:
    """One launch.

    Args:
        program: the kernel.
        grid: blocks in x, y and z.
        arguments: bits of each parameter, in order.
        memory: what the kernel may touch.
        shared_bytes: shared memory of a block.
        seed: of the errors of approximate instructions, see ``floats.Approximation``.
        limit: instructions, counted once for all threads, after which the kernel does not end.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        arguments: Sequence[int],
        memory: GlobalMemory,
        shared_bytes: int = 0,
        seed: int | None = None,
        limit: int = 1_000_000,
    ) -> None:
        blocks = grid[0] * grid[1] * grid[2]
        self.program, self.memory, self.counts = program, memory, Counts()
        self.count = blocks * program.threads
        self.threads = Threads(blocks, program.threads)
        self.shared = SharedMemory(shared_bytes, self.threads)
        self.approximate = Approximation(seed)
        self._everyone = np.arange(self.count)
        self._limit = limit
        self._arguments = dict(zip(program.parameters, arguments, strict=True))
        self.registers = Registers(self.count, self._special(grid), program.shared)
        memory.begin(self.threads)

    def _special(self, grid: Sequence[int]) -> dict[str, NDArray]:
        block = self.threads.block
        thread = np.tile(np.arange(self.program.threads), len(self.threads.passed))
        values = {
            "%tid.x": thread,
            "%laneid": thread % 32,
            "%ctaid.x": block % grid[0],
            "%ctaid.y": block // grid[0] % grid[1],
            "%ctaid.z": block // (grid[0] * grid[1]),
            **{f"%nctaid.{axis}": np.full_like(block, size) for axis, size in zip("xyz", grid, strict=True)},
            "%ntid.x": np.full_like(block, self.program.threads),
        }
        return {name: value.astype(np.uint32) for name, value in values.items()}

    def parameter(self, name: str) -> NDArray:
        """The bits of a parameter, of its own size."""
        return np.array(self._arguments[name], f"u{self.program.parameters[name]}")

    def threads_of(self, active: NDArray | None) -> NDArray:
        """Indices of the active threads."""
        return self._everyone if active is None else np.flatnonzero(active)

    def run(self) -> Counts:
        """Execute the kernel to its end.

        Raises:
            Fault: where it does what has no defined result.
            UnknownInstruction: for an instruction that is not emulated.
        """
        with np.errstate(all="ignore"):
            self._run()
        return self.counts

    def _run(self) -> None:
        code = self.program.code
        steps = [executor(x) if x.parts[0] not in _CONTROL else None for x in code]
        at, places = 0, None  # where all threads are; where each is while they are apart
        for _ in range(self._limit):
            here = None
            if places is not None:
                at = int(places.min())
                here = places == at
                if here.all():
                    places, here = None, None
            if at >= len(code):
                return
            x = code[at]
            active = self._active(x, here)
            number = self.count if active is None else int(np.count_nonzero(active))
            self.counts.instructions[x.opcode] += number
            if steps[at] is not None:
                if number:
                    try:
                        steps[at](self, x, active)
                    except Fault as fault:
                        raise Fault(f"{self.program.name}, {x.where}: {fault} ({x.text})") from None
                following = at + 1
            elif x.parts[0] in ("bar", "barrier"):
                self._barrier(x, active, places)
                following = at + 1
            elif x.parts[0] == "nop":
                following = at + 1
            else:
                following = self.program.labels[x.operands[0].name] if x.parts[0] == "bra" else _END
                if active is not None:  # some go there, the others on
                    places = np.full(self.count, at) if places is None else places
                    places[self._everyone if here is None else here] = at + 1
                    places[active] = following
                    continue
            if places is None:
                at = following
            else:
                places[here] = following
        raise Fault(f"{self.program.name} does not end")

    def _active(self, x: Instruction, here: NDArray | None) -> NDArray | None:
        if x.predicate is None:
            return here
        holds = np.broadcast_to(self.registers.read(x.predicate, "pred"), (self.count,))
        active = ~holds if x.negated else holds
        if here is not None:
            active = active & here
        return None if active.all() else active

    def _barrier(self, x: Instruction, active: NDArray | None, places: NDArray | None) -> None:
        """All threads of a block that have not ended must be there."""
        if x.operands and getattr(x.operands[0], "value", 0) != 0:
            raise Fault(f"a barrier other than 0 ({x.text})")
        arrived = np.ones(self.count, bool) if active is None else active
        living = np.ones(self.count, bool) if places is None else places < _END
        arrived, living = (y.reshape(-1, self.program.threads) for y in (arrived, living))
        if (arrived.any(1) & (arrived != living).any(1)).any():
            raise Fault(f"{self.program.name}, {x.where}: a barrier is reached by some threads of a block alone")
        self.threads.passed += arrived.any(1)
