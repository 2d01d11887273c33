"""A CPU's large blocks of memory: kept from call to call, and in large pages where the system has them.

A block that is fresh from the system is mapped page by page when it is first written to, which takes as long as several
passes over it. PyTorch keeps what a GPU has freed, and gives a CPU's large blocks back to the system. So the large ones
of a call are kept here, and serve again once nobody holds them: slabs in the next call, a head's gradient when
the optimizer has set it to None. In between, a system that is short of memory may take their pages (MADV_FREE).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import weakref

import torch
from torch import Tensor

#: Smaller blocks come from the C library's heap, which keeps them itself.
_LEAST_BYTES = 1 << 25
#: What is kept at most: about the default workspace of a call and the gradient of a large head.
_KEPT_BYTES = 5 * 2**29
#: Free blocks by number. Single operations of a dict need no lock, which a finaliser could wait for in vain.
_FREE: dict[int, mmap.mmap] = {}
_NUMBERS = itertools.count()
#: Where a system cannot be told that it may take pages back, nothing is kept.
_KEEPS = hasattr(mmap, "MADV_FREE")


def large_empty(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """``like.new_empty(size)``, on a CPU from memory that is kept.

    Args:
        like: whose device and, without ``dtype``, whose dtype it has. size: of it. dtype: or another one.
    """
    dtype = like.dtype if dtype is None else dtype
    needed = torch.Size(size).numel() * dtype.itemsize
    kept = like.device.type == "cpu" and needed >= _LEAST_BYTES and _KEEPS and type(like) is Tensor
    block = (_taken(needed) or _made(needed)) if kept else None
    if block is None:
        return like.new_empty(size, dtype=dtype)
    # PyTorch holds the view of the block until the last tensor on it is gone.
    view = (ctypes.c_char * len(block)).from_buffer(block)
    weakref.finalize(view, _keep, block).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=needed // dtype.itemsize).view(size)


def _taken(needed: int) -> mmap.mmap | None:
    """The smallest free block of so many bytes."""
    for number, block in sorted(_FREE.items(), key=lambda item: len(item[1])):
        if len(block) >= needed and _FREE.pop(number, None) is not None:
            return block
    return None


def _made(needed: int) -> mmap.mmap | None:
    """A new one, whose pages will be large if they can be; None without memory, which PyTorch then says in its words.

    A little more is asked for, so that it serves for other tokens too; what is not written to takes no memory.
    """
    size, flags = -(-needed // _LEAST_BYTES) * _LEAST_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        block = mmap.mmap(-1, size, flags=flags)
    except OSError:
        return None
    with contextlib.suppress(OSError, AttributeError):  # "never" in the system's settings, or no such advice
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _keep(block: mmap.mmap) -> None:
    """Keep a block that nobody holds any more, as long as there are not too many."""
    with contextlib.suppress(OSError):
        block.madvise(mmap.MADV_FREE)
        _FREE[next(_NUMBERS)] = block
    free = sorted(_FREE.items(), key=lambda item: len(item[1]))
    kept = sum(len(block) for _, block in free)
    for number, smallest in free:  # a larger one serves in their place
        if kept <= _KEPT_BYTES:
            break
        _FREE.pop(number, None)
        kept -= len(smallest)


def release_workspace() -> int:
    """Give the memory that is kept between calls on CPUs back to the system; returns its bytes."""
    freed = 0
    for number in list(_FREE):
        block = _FREE.pop(number, None)
        freed += 0 if block is None else len(block)
    return freed
