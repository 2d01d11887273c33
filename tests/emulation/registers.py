"""Registers of all threads of a launch: one array of raw bits for each name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .floats import from_bfloat16, from_float16
from .memory import Fault
from .ptx import Address, Immediate, Operand, Register, Symbol

#: PTX type -> how the bits are seen, and as what.
KINDS = {
    **{f"{letter}{width}": np.dtype(f"{code}{width // 8}") for letter, code in (("u", "u"), ("b", "u"), ("s", "i"))
       for width in (8, 16, 32, 64)},
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "pred": np.dtype(bool),
}  # fmt: skip
#: Left in a register where a masked instruction wrote nothing: what depends on it becomes visibly wrong. NaN for every
#: other thread, as a maximum does not keep it, and elsewhere 2.7e23.
_POISON = {4: (0x7FC0DEAD, 0x6666DEAD), 8: (0x7FF8DEAD00000000, 0x6666DEAD), 2: (0x7FFF, 0x7A66), 1: (1, 0)}


class Registers:
    """Args:
    count: threads of the launch.
    special: name -> values of the read-only registers.
    shared: array in shared memory -> its address.
    """

    def __init__(self, count: int, special: Mapping[str, NDArray], shared: Mapping[str, int]) -> None:
        self._count, self._special, self._shared = count, special, shared
        self._values: dict[str, NDArray] = {}

    def _bits(self, name: str) -> NDArray:
        found = self._special.get(name)
        if found is None:
            found = self._values.get(name)
        if found is None:
            raise Fault(f"unwritten: register {name} is read before anything was written to it")
        return found

    def read(self, operand: Operand, kind: str) -> NDArray:
        """Values of an operand as a PTX type: [threads], or one for all. Of 16-bit floats as float32."""
        if kind in ("bf16", "f16"):
            bits = np.asarray(self.read(operand, "b16"))
            return from_bfloat16(bits) if kind == "bf16" else from_float16(bits)
        dtype = KINDS[kind]
        if isinstance(operand, Register):
            bits = self._bits(operand.name)
            if bits.dtype.itemsize == dtype.itemsize:
                return bits.view(dtype)
            if kind in ("pred", "f32", "f64"):
                raise Fault(f"{operand.name} holds no {kind}")
            return bits.astype(dtype)  # the lower bits
        if isinstance(operand, Immediate):
            mask = (1 << 8 * dtype.itemsize) - 1
            return np.array([operand.value & mask], f"u{dtype.itemsize}").view(dtype)[0]
        if isinstance(operand, Symbol) and operand.name in self._shared:
            return dtype.type(self._shared[operand.name])
        raise Fault(f"{operand} is no value")

    def address(self, operand: Address, kind: str) -> NDArray:
        """Byte addresses [threads], int64."""
        base = np.broadcast_to(self.read(operand.base, kind), (self._count,))
        return base.astype(np.int64) + operand.offset

    def write(self, operand: Operand, value: NDArray, active: NDArray | None) -> None:
        """Keep values, by their bits, for the active threads (None: all)."""
        if not isinstance(operand, Register):
            raise Fault(f"{operand} cannot be written")
        value = np.asarray(value)
        if value.ndim == 0:
            value = np.full(self._count, value)
        if value.dtype != bool:
            value = value.view(f"u{value.dtype.itemsize}")
        if active is not None:
            before = self._values.get(operand.name)
            if before is None or before.dtype != value.dtype:
                before = np.resize(np.array(_POISON[value.dtype.itemsize]).astype(value.dtype), self._count)
            value = np.where(active, value, before)
        self._values[operand.name] = value
