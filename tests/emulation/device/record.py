"""What a call asks of the device: kernels of PyTorch and of Triton, products, waits of the host, memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..triton_device import Device, Launch

_library = ctypes.CDLL(None)


class Product(NamedTuple):
    """A matrix product as cuBLAS sees it, columns first: C [m, n] (+)= op(A) [m, k] @ op(B) [k, n]."""

    transposed: str
    m: int
    n: int
    k: int
    a: str
    b: str
    c: str
    adds: bool


@dataclass
class Record:
    """One call.

    Attributes:
        kernels: PyTorch's own, by their names in the library.
        products: through cuBLAS and cuBLASLt.
        launches: of Triton kernels.
        waits: what the host waited for.
        copies: of memory, and settings of it.
        loaded: Triton kernels that were compiled for it.
        bad: what a GPU would have refused.
        peak_bytes: allocated at most beyond what was there before.
    """

    kernels: list[str] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    copies: int = 0
    loaded: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    peak_bytes: int = 0

    def counts(self) -> dict[str, int]:
        """Numbers of everything, and bytes."""
        return {
            "kernels": len(self.kernels),
            "products": len(self.products),
            "launches": len(self.launches),
            "waits": len(self.waits),
            "copies": self.copies,
            "loaded": len(self.loaded),
            "peak_bytes": self.peak_bytes,
        }


_PRODUCT = re.compile(r"product (\w+) (\d+) (\d+) (\d+) (\w+) (\w+) (\w+) beta (\S+)")


def parse(text: str) -> Record:
    """The log of the stand-ins."""
    record = Record()
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if " BAD " in line:
            record.bad.append(line)
        if word == "kernel":
            record.kernels.append(rest.split(" ")[0])
        elif word == "product":
            transposed, m, n, k, a, b, c, beta = _PRODUCT.match(line).groups()
            record.products.append(Product(transposed, int(m), int(n), int(k), a, b, c, float(beta) != 0))
        elif word == "wait" or line.endswith(" wait"):
            record.waits.append(line)
        if word in ("copy", "set"):
            record.copies += 1
    return record


def move_at_most(size: int) -> None:
    """Let copies and settings of more bytes do nothing: what nobody touches costs nothing."""
    _library.emulation_move(ctypes.c_size_t(size))


def record(device: Device, call: Callable[[], Any]) -> Record:
    """Run a call and return what it asked for."""
    _library.emulation_stop.restype = ctypes.c_char_p
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    device.launches.clear()
    device.loaded.clear()
    _library.emulation_start()
    try:
        call()
    finally:
        found = parse(_library.emulation_stop().decode())
    found.peak_bytes = torch.cuda.max_memory_allocated() - before
    found.launches, found.loaded = list(device.launches), list(device.loaded)
    return found
