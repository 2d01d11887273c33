"""A CPU's large blocks of memory: kept from call to call, and in large pages where the system has them.

A block that is fresh from the system is mapped page by page when it is first written to, which takes as long as several
passes over it. PyTorch keeps what a GPU has freed, and gives a CPU's large blocks back to the system. So those of a
call are kept here for the next one; in between, a system that is short of memory may take their pages (MADV_FREE).
Where it cannot be told so, nothing is kept.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

#: Smaller blocks come from the C library's heap, which keeps them itself.
_LEAST_BYTES = 1 << 25
#: The default bound on the scratch memory of one call, see ``api.DEFAULT_WORKSPACE_BYTES``.
_KEPT_BYTES = 5 * 2**28
#: Free blocks by number. Single operations of a dict need no lock, which a finaliser could wait for in vain.
_FREE: dict[int, Tensor] = {}
_NUMBERS = itertools.count()


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """madvise(address, bytes, advice); None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function


def _tell(block: Tensor, advice: str) -> bool:
    """Advise the system about the whole pages of a block; whether it took that."""
    number, advise, page = getattr(mmap, advice, None), _advise(), mmap.PAGESIZE
    if number is None or advise is None:
        return False
    start = -(-block.data_ptr() // page) * page
    end = (block.data_ptr() + block.nbytes) // page * page
    return end <= start or advise(start, end - start, number) == 0


def in_large_pages(block: Tensor) -> Tensor:
    """The block itself, just allocated and not yet written to; its pages will be large if they can be."""
    if block.device.type == "cpu" and block.nbytes >= _LEAST_BYTES and type(block) is Tensor:
        _tell(block, "MADV_HUGEPAGE")  # a refusal ("never" in the system's settings) changes nothing
    return block


class Workspace:
    """Blocks for as long as they are in use; then they are kept for the next call."""

    def __init__(self) -> None:
        self._held: list[Tensor] = []

    def empty(self, like: Tensor, *size: int) -> Tensor:
        """A tensor with the dtype and device of ``like``, that holds anything; void once the workspace is closed."""
        found = torch.Size(size).numel()
        needed = found * like.itemsize
        if like.device.type != "cpu" or needed < _LEAST_BYTES:
            return like.new_empty(size)
        block = _taken(needed)
        self._held.append(_made(needed) if block is None else block)
        return self._held[-1][:needed].view(like.dtype).view(size)

    def close(self) -> None:
        """Keep the blocks for later calls, but for those that somebody still holds, such as an interrupted loop."""
        while self._held:
            block = self._held.pop()
            # Two owners: the block, and the storage asked for here.
            alone = torch._C._storage_Use_Count(block.untyped_storage()._cdata) <= 2
            if alone and _tell(block, "MADV_FREE"):
                _FREE[next(_NUMBERS)] = block
        free = sorted(_FREE.items(), key=lambda item: item[1].nbytes)
        kept = sum(block.nbytes for _, block in free)
        for number, block in free:  # the smallest go first: a larger one serves in their place
            if kept <= _KEPT_BYTES:
                break
            _FREE.pop(number, None)
            kept -= block.nbytes

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _taken(needed: int) -> Tensor | None:
    """The smallest free block of so many bytes."""
    for number, block in sorted(_FREE.items(), key=lambda item: item[1].nbytes):
        if block.nbytes >= needed and _FREE.pop(number, None) is not None:
            return block
    return None


def _made(needed: int) -> Tensor:
    """A new one. One that is born in inference mode could not be written to outside."""
    with torch.inference_mode(False):
        return in_large_pages(torch.empty(needed, dtype=torch.uint8))


def release_workspace() -> int:
    """Give the memory that is kept between calls on CPUs back to the system; returns its bytes."""
    freed = 0
    for number in list(_FREE):
        block = _FREE.pop(number, None)
        freed += 0 if block is None else block.nbytes
    return freed
