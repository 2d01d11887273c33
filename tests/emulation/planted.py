"""Faults that are planted into compiled kernels: each changes one instruction, and must be noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from .ptx import Address, Immediate, Instruction, Program, Vector

Change = Callable[[Instruction], Instruction | None]


class Planted(NamedTuple):
    """One fault: what was done, and to which instruction."""

    kind: str
    at: int

    def __call__(self, program: Program) -> Program:
        """The program with this fault."""
        code = list(program.code)
        changed = KINDS[self.kind](code[self.at])
        code[self.at] = code[self.at]._replace(opcode="nop", parts=("nop",)) if changed is None else changed
        return replace(program, code=code)


def _renamed(x: Instruction, old: str, new: str) -> Instruction | None:
    parts = tuple(new if part == old else part for part in x.parts)
    return None if parts == x.parts else x._replace(parts=parts, opcode=".".join(parts))


def _only(names: str, change: Change) -> Change:
    """Where the opcode begins with one of these names."""
    return lambda x: change(x) if x.opcode.startswith(tuple(names.split())) else x


def _swapped(first: int, second: int) -> Change:
    def change(x: Instruction) -> Instruction:
        operands = list(x.operands)
        operands[first], operands[second] = operands[second], operands[first]
        return x._replace(operands=tuple(operands))

    return change


#: By which a logarithm scales denormal numbers; no call has any.
_DENORMAL = 0x4B000000


def _constant_off(x: Instruction) -> Instruction:
    """The first float among the operands is a hundredth larger."""
    operands = tuple(
        y._replace(value=y.value + 0x14000)
        if isinstance(y, Immediate) and y.is_float and y.value not in (0, _DENORMAL)
        else y
        for y in x.operands
    )
    return x._replace(operands=operands)


def _moved(x: Instruction) -> Instruction:
    """An address is an element further on."""
    size = int("".join(c for c in x.parts[-1] if c.isdigit())) // 8
    lanes = next((len(y.items) for y in x.operands if isinstance(y, Vector)), 1)
    operands = tuple(y._replace(offset=y.offset + size * lanes) if isinstance(y, Address) else y for y in x.operands)
    return x._replace(operands=operands)


def _near(x: Instruction) -> Instruction:
    operands = list(x.operands)
    operands[2] = Immediate(operands[2].value // 2)
    return x._replace(operands=tuple(operands))


#: Kind -> what it makes of an instruction: itself where it does not apply, None to leave it out.
KINDS: dict[str, Change] = {
    "barrier left out": _only("bar.", lambda x: None),
    "load for all threads": _only("ld.global", lambda x: x._replace(predicate=None)),
    "store by all threads": _only("st.global", lambda x: x._replace(predicate=None)),
    "mask turned round": _only("ld.global st.global", lambda x: x if x.predicate is None else x._replace(negated=True)),
    "bound off by one": _only("setp.lt.s", lambda x: _renamed(x, "lt", "le")),
    "difference turned round": _only("sub.f32", _swapped(1, 2)),
    "quotient turned round": _only("div.", _swapped(1, 2)),
    "choice turned round": _only("selp", _swapped(1, 2)),
    "maximum as minimum": _only("max.f32", lambda x: _renamed(x, "max", "min")),
    "sum as difference": _only("add.f32", lambda x: _renamed(x, "add", "sub")),
    "constant off": _only("mul.f32", _constant_off),
    "address moved": _only("ld.global st.global", _moved),
    "shuffle of half the distance": _only("shfl", _near),
    "truncated": _only("cvt.rn.bf16", lambda x: _renamed(x, "rn", "rz")),
    "exponential left out": _only("ex2", lambda x: None),
    "stored elsewhere": _only("st.shared", _moved),
}
#: Those that often make no difference: a load or store by all threads takes one value of a row several times, a sum may
#: be centred at any number near its maximum, and a bound is compared for each column of a vector.
HARMLESS = (
    *("load for all threads", "store by all threads"),
    *("maximum as minimum", "shuffle of half the distance", "bound off by one"),
)
#: Those that always make one.
SURE = ("barrier left out", "address moved", "truncated", "exponential left out", "stored elsewhere")


def planted(program: Program) -> Iterator[Planted]:
    """Every fault that a kernel can have, by kind."""
    for kind, change in KINDS.items():
        if kind == "barrier left out" and program.threads == 32:
            continue  # a warp has its threads in order, and here each reads what it writes itself
        for at, x in enumerate(program.code):
            if change(x) is not x and change(x) != x:
                yield Planted(kind, at)
