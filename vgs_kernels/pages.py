"""Large blocks of a CPU's memory in large pages, where the system has them.

A fresh block is mapped page by page when it is first written to, and pages of 4 KiB take as long as several passes
over the block. Linux maps up to 2 MiB at a time where it is asked to; what is resident stays the same.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

#: Bytes that are worth it: some tens of large pages, of which the first and the last may not be whole.
_LEAST_BYTES = 1 << 26


@functools.cache
def _advise() -> Callable[[int, int], object] | None:
    """madvise(address, bytes) that asks for large pages; None where there is none."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return lambda address, size: function(address, size, advice)


def in_large_pages(block: Tensor) -> Tensor:
    """The block itself, just allocated and not yet written to; its pages will be large if they can be."""
    if block.device.type != "cpu" or block.nbytes < _LEAST_BYTES or type(block) is not Tensor:
        return block
    advise, page = _advise(), mmap.PAGESIZE
    if advise is not None:
        start = -(-block.data_ptr() // page) * page
        end = (block.data_ptr() + block.nbytes) // page * page
        advise(start, end - start)  # a refusal ("never" in the system's settings) changes nothing
    return block
