"""Memory of an emulated kernel, which notices what a GPU would do silently.

Global memory: accesses outside of the given tensors' storages, addresses that are not aligned, and races. Shared
memory: the same, and words that nobody has written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Fault(Exception):
    """A kernel does what has no defined result."""


class Threads:
    """Who they are: block of each thread, and how many barriers the block has passed.

    Args:
        blocks: number of them.
        size: threads of a block.
    """

    WARP = 32

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.block = np.repeat(np.arange(blocks, dtype=np.int64), size)
        self.passed = np.zeros(blocks, np.int64)


class AccessLog:
    """Who read and who wrote each cell, to find accesses that nothing puts into an order.

    Two threads of a block are in order if the block passed a barrier between them; threads of two blocks never are. As
    all threads advance together here, values alone would not show a race.
    """

    def __init__(self, cells: int, threads: Threads) -> None:
        self._threads = threads
        self._writer, self._write_time = np.full(cells, -1, np.int64), np.zeros(cells, np.int64)
        self._reader, self._read_time = np.full(cells, -1, np.int64), np.zeros(cells, np.int64)
        self._several_readers, self._several_blocks = np.zeros(cells, bool), np.zeros(cells, bool)

    def _unordered(self, other: NDArray, time: NDArray, thread: NDArray) -> NDArray:
        block = self._threads.block[thread]
        elsewhere = other // self._threads.size != block
        return (other >= 0) & (other != thread) & (elsewhere | (time == self._threads.passed[block]))

    def read(self, cells: NDArray, thread: NDArray) -> None:
        """Log that each thread reads its cell.

        Raises:
            Fault: for a race.
        """
        if self._unordered(self._writer[cells], self._write_time[cells], thread).any():
            raise Fault("race: read of what another thread wrote, with no barrier between them")
        block = self._threads.block[thread]
        now = self._threads.passed[block]
        earlier = self._reader[cells]
        other_block = (earlier >= 0) & (earlier // self._threads.size != block)
        recent = (earlier >= 0) & ~other_block & (self._read_time[cells] == now)
        self._several_blocks[cells[other_block]] = True
        self._several_readers[cells[~recent]] = False
        self._several_readers[cells[recent & (earlier != thread)]] = True
        self._reader[cells], self._read_time[cells] = thread, now
        last = self._reader[cells]  # of several readers in this instruction
        self._several_readers[cells[last != thread]] = True
        self._several_blocks[cells[last // self._threads.size != block]] = True

    def write(self, cells: NDArray, thread: NDArray, values: NDArray, one_of_a_warp: bool = False) -> None:
        """Log that each thread writes a value to its cell.

        Args:
            one_of_a_warp: whether threads of a warp may write different values to a cell, of which one stays.

        Raises:
            Fault: for a race.
        """
        block = self._threads.block[thread]
        reader, time = self._reader[cells], self._read_time[cells]
        recent = (reader >= 0) & (time == self._threads.passed[block])
        if (
            self._unordered(reader, time, thread)
            | (recent & self._several_readers[cells])
            | self._several_blocks[cells]
        ).any():
            raise Fault("race: write over what another thread reads, with no barrier between them")
        if self._unordered(self._writer[cells], self._write_time[cells], thread).any():
            raise Fault("race: write over what another thread wrote, with no barrier between them")
        self._writer[cells], self._write_time[cells] = thread, self._threads.passed[block]
        order = np.lexsort((values, cells))
        cells, thread, values = cells[order], thread[order], values[order]
        differ = (cells[1:] == cells[:-1]) & (values[1:] != values[:-1])
        if one_of_a_warp:
            differ &= thread[1:] // Threads.WARP != thread[:-1] // Threads.WARP
        if differ.any():
            raise Fault("race: two threads write different values to one place at once")


class GlobalMemory:
    """The storages of the tensors that a kernel was given, at their own addresses.

    Args:
        storages: of the tensors; any may occur twice.
    """

    def __init__(self, storages: Sequence[torch.UntypedStorage]) -> None:
        ranges = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()})
        self._keep = list(storages)
        self._starts = np.array([start for start, _ in ranges], np.int64)
        self._ends = np.array([end for _, end in ranges], np.int64)
        sizes = (self._ends - self._starts + 1) // 2  # cells of two bytes
        self._first_cell = np.concatenate([[0], np.cumsum(sizes)])
        self._low = int(self._starts[0]) // 16 * 16 if ranges else 0
        span = (int(self._ends.max()) if ranges else 16) - self._low
        # All of it as one array: what lies between the storages is never touched.
        whole = (ctypes.c_uint8 * (span + 16)).from_address(self._low) if ranges else bytearray(16)
        self._views = {size: np.frombuffer(whole, kind, count=-(-span // size)) for size, kind in _UNSIGNED.items()}
        self._log: AccessLog | None = None

    def begin(self, threads: Threads) -> None:
        """Watch the accesses of a launch."""
        self._log = AccessLog(int(self._first_cell[-1]), threads)

    def _cells(self, address: NDArray, size: int, count: int) -> NDArray:
        """Cell of each thread's first element, after checks of all ``count``."""
        if (address % (size * count)).any():
            raise Fault(
                f"misaligned: an access of {size * count} bytes at {int(address[address % (size * count) != 0][0])}"
            )
        if not len(self._starts):
            raise Fault("out of bounds: the kernel was given no memory")
        place = np.searchsorted(self._starts, address, side="right") - 1
        outside = (place < 0) | (address + size * count > self._ends[place])
        if outside.any():
            first = int(np.flatnonzero(outside)[0])
            start, end = self._starts[place[first]], self._ends[place[first]]
            raise Fault(
                f"out of bounds: {int(outside.sum())} accesses, the first at byte {address[first] - start} "
                f"of a storage of {end - start}"
            )
        return self._first_cell[place] + (address - self._starts[place]) // 2

    def load(self, address: NDArray, size: int, count: int, thread: NDArray) -> list[NDArray]:
        """``count`` neighbouring elements for each thread, as unsigned numbers of ``size`` bytes.

        Raises:
            Fault: for an access that has no defined result.
        """
        cells = self._cells(address, size, count)
        at = (address - self._low) // size
        for index in range(count):
            self._log.read(cells + index * size // 2, thread)
        return [self._views[size][at + index] for index in range(count)]

    def store(self, address: NDArray, values: Sequence[NDArray], size: int, thread: NDArray) -> None:
        """Write neighbouring elements; see ``load``."""
        cells = self._cells(address, size, len(values))
        at = (address - self._low) // size
        for index, value in enumerate(values):
            self._log.write(cells + index * size // 2, thread, value)
            self._views[size][at + index] = value


class SharedMemory:
    """Shared memory of every block, in words of four bytes.

    When all threads of a warp store a sum that they have formed together, compiled code lets each store its own
    rounding of it: LLVM makes a fused multiply-add of the first addition, which is not symmetric. One of them stays,
    which one is not defined. Here it is the last one's.

    Args:
        size: bytes of a block.
        threads: of the launch.
    """

    def __init__(self, size: int, threads: Threads) -> None:
        self._size, self._threads = size, threads
        words = len(threads.passed) * -(-size // 4)
        self._words, self._written = np.zeros(words, np.uint32), np.zeros(words, bool)
        self._log = AccessLog(words, threads)

    def _places(self, address: NDArray, count: int, thread: NDArray) -> NDArray:
        if (address % (4 * count)).any():
            raise Fault("misaligned: shared memory")
        if ((address < 0) | (address + 4 * count > self._size)).any():
            raise Fault(f"out of bounds: shared memory of {self._size} bytes, at {int(address.max())}")
        return self._threads.block[thread] * -(-self._size // 4) + address // 4

    def load(self, address: NDArray, count: int, thread: NDArray) -> list[NDArray]:
        """As ``GlobalMemory.load``."""
        first = self._places(address, count, thread)
        for word in (places := [first + index for index in range(count)]):
            if not self._written[word].all():
                raise Fault("unwritten: read of shared memory that nobody wrote")
            self._log.read(word, thread)
        return [self._words[word] for word in places]

    def store(self, address: NDArray, values: Sequence[NDArray], thread: NDArray) -> None:
        """As ``GlobalMemory.store``."""
        first = self._places(address, len(values), thread)
        for index, value in enumerate(values):
            self._log.write(first + index, thread, value, one_of_a_warp=True)
            self._words[first + index], self._written[first + index] = value, True
