"""What each PTX instruction computes. See NVIDIA's "Parallel Thread Execution ISA" for their meaning.

A function takes the machine, the instruction and the active threads (None: all of them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .floats import bfloat16_bits, coarse, float16_bits, flush, fma, fma_double, truncated_bfloat16_bits
from .memory import Fault, Threads
from .ptx import Instruction, Operand, Vector
from .registers import KINDS

if TYPE_CHECKING:
    from .machine import Machine

Active = NDArray | None
Execute = Callable[["Machine", Instruction, Active], None]


class UnknownInstruction(Exception):
    """An instruction that is not emulated."""


def _items(operand: Operand) -> tuple[Operand, ...]:
    return operand.items if isinstance(operand, Vector) else (operand,)


# Memory.


def _load(machine: Machine, x: Instruction, active: Active) -> None:
    target, source = x.operands
    kind = x.parts[-1]
    space = x.parts[1]
    if space == "param":
        name = source.base.name
        if machine.program.parameters[name] != KINDS[kind].itemsize:
            raise Fault(f"parameter {name} is read as {kind}")
        machine.registers.write(target, machine.parameter(name), active)
        return
    size, targets, threads = KINDS[kind].itemsize, _items(target), machine.threads_of(active)
    if space == "shared":
        address = machine.registers.address(source, "b32")[threads]
        found = machine.shared.load(address, len(targets), threads)
    else:
        address = machine.registers.address(source, "b64")[threads]
        found = machine.memory.load(address, size, len(targets), threads)
        again = (np.diff(address) == 0) & (np.diff(threads // Threads.WARP) == 0)
        machine.counts.loaded += size * len(targets) * (len(threads) - np.count_nonzero(again))
    for register, values in zip(targets, found, strict=True):
        whole = np.zeros(machine.count, values.dtype if size > 1 else np.uint16)
        whole[threads] = values
        machine.registers.write(register, whole, active)


def _store(machine: Machine, x: Instruction, active: Active) -> None:
    target, source = x.operands
    size, sources, threads = KINDS[x.parts[-1]].itemsize, _items(source), machine.threads_of(active)
    values = [
        np.broadcast_to(machine.registers.read(item, f"b{8 * size}"), (machine.count,))[threads] for item in sources
    ]
    if x.parts[1] == "shared":
        machine.shared.store(machine.registers.address(target, "b32")[threads], values, threads)
    else:
        machine.memory.store(machine.registers.address(target, "b64")[threads], values, size, threads)
        machine.counts.stored += size * len(sources) * len(threads)


def _shuffle(machine: Machine, x: Instruction, active: Active) -> None:
    """Threads of a warp exchange registers: all take part, or none."""
    target, source, distance, clamp, mask = x.operands
    if x.parts[2] != "bfly" or (clamp.value, mask.value & 0xFFFFFFFF) != (31, 0xFFFFFFFF):
        raise UnknownInstruction(x.text)
    _by_whole_warps("a shuffle", active)
    values = np.broadcast_to(machine.registers.read(source, "b32"), (machine.count,))
    machine.registers.write(_items(target)[0], values[np.arange(machine.count) ^ distance.value], active)


def _reduce(machine: Machine, x: Instruction, active: Active) -> None:
    """Every thread of a warp gets the sum (or another combination) of all: they take part, or none."""
    target, source, mask = x.operands
    members = np.broadcast_to(machine.registers.read(mask, "b32"), (machine.count,))
    members = members if active is None else members[active]
    if x.parts[2] not in _INTEGER or (members != np.uint32(0xFFFFFFFF).astype(members.dtype)).any():
        raise UnknownInstruction(x.text)
    _by_whole_warps("a reduction", active)
    values = np.broadcast_to(machine.registers.read(source, x.parts[-1]), (machine.count,)).reshape(-1, 32)
    machine.registers.write(target, np.repeat(_INTEGER[x.parts[2]].reduce(values, axis=1), 32), active)


def _by_whole_warps(what: str, active: Active) -> None:
    if active is not None:
        here = active.reshape(-1, 32)
        if (here.any(1) != here.all(1)).any():
            raise Fault(f"{what} is reached by some threads of a warp alone")


def _load_matrices(machine: Machine, x: Instruction, active: Active) -> None:
    """A warp loads matrices of 8 x 8 elements of 16 bits; every 8 of its threads hold the rows' addresses of one."""
    if x.parts[3] != "m8n8" or x.parts[-2:] != ("shared", "b16"):
        raise UnknownInstruction(x.text)
    _by_whole_warps("a load of matrices", active)
    target, source = x.operands
    threads = machine.threads_of(active)
    address = np.broadcast_to(machine.registers.address(source, "b32"), (machine.count,))
    if (address[threads] % 16).any():
        raise Fault("misaligned: shared memory")
    lane = threads % 32
    for matrix, register in enumerate(_items(target)):
        place = address[threads - lane + 8 * matrix + lane // 4] + 4 * (lane % 4)
        (values,) = machine.shared.load(place, 1, threads)
        whole = np.zeros(machine.count, values.dtype)
        whole[threads] = values
        machine.registers.write(register, whole, active)


# Moves, choices, conversions.


def _move(machine: Machine, x: Instruction, active: Active) -> None:
    target, source = x.operands
    read, write, kind = machine.registers.read, machine.registers.write, x.parts[-1]
    width = KINDS[kind].itemsize * 8
    if isinstance(source, Vector):  # several registers become one
        part = width // len(source.items)
        total = np.zeros(machine.count, f"u{width // 8}")
        for index, item in enumerate(source.items):
            total |= read(item, f"b{part}").astype(total.dtype) << total.dtype.type(part * index)
        write(target, total, active)
    elif isinstance(target, Vector):  # one becomes several
        part = width // len(target.items)
        value = read(source, f"b{width}")
        for index, item in enumerate(target.items):
            write(item, (value >> value.dtype.type(part * index)).astype(f"u{part // 8}"), active)
    else:
        write(target, read(source, kind), active)


def _select(machine: Machine, x: Instruction, active: Active) -> None:
    target, first, second, condition = x.operands
    read, kind = machine.registers.read, x.parts[-1]
    kind = {"f32": "b32", "f64": "b64"}.get(kind, kind)
    machine.registers.write(target, np.where(read(condition, "pred"), read(first, kind), read(second, kind)), active)


_INTEGERS = {"s8", "s16", "s32", "s64", "u8", "u16", "u32", "u64"}


def _to_integer(value: NDArray, kind: str, parts: tuple[str, ...]) -> NDArray:
    """Rounded as asked for; what lies outside becomes the nearest number, NaN becomes 0."""
    rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    (name,) = rounding.keys() & set(parts)
    limits = np.iinfo(KINDS[kind])
    whole = rounding[name](value.astype(np.float64))
    inside = np.clip(np.nan_to_num(whole, nan=0.0), float(limits.min), float(limits.max))
    return inside.astype(KINDS[kind])


def _convert(machine: Machine, x: Instruction, active: Active) -> None:
    target, *sources = x.operands
    read, (to, of) = machine.registers.read, x.parts[-2:]
    values = [read(source, of) for source in sources]
    halves = {"bf16": truncated_bfloat16_bits if "rz" in x.parts else bfloat16_bits, "f16": float16_bits}
    if (of in KINDS and KINDS[of].kind == "f") or of in halves:
        if "ftz" in x.parts:
            values = [flush(value) for value in values]
        if to in halves:
            result = halves[to](values[0])
        elif to.removesuffix("x2") in halves:  # the first operand becomes the upper half
            high, low = (halves[to.removesuffix("x2")](value).astype(np.uint32) for value in values)
            result = high << np.uint32(16) | low
        elif to in _INTEGERS:
            result = _to_integer(values[0], to, x.parts)
        else:
            result = values[0].astype(KINDS[to])
    else:
        result = values[0].astype(KINDS[to])
    machine.registers.write(target, result, active)


# Comparisons and predicates.

_ORDERED = {
    **{"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
}


def _compared(name: str, x: NDArray, y: NDArray, floating: bool) -> NDArray:
    if not floating:
        return _ORDERED[name](x, y)
    nothing = np.isnan(x) | np.isnan(y)
    if name in ("num", "nan"):
        return ~nothing if name == "num" else nothing
    if len(name) == 3 and name[-1] == "u":  # true where one is NaN
        return _ORDERED[name[:-1]](x, y) | nothing
    return _ORDERED[name](x, y) & ~nothing


def _set_predicate(machine: Machine, x: Instruction, active: Active) -> None:
    target, first, second, *third = x.operands
    read, kind = machine.registers.read, x.parts[-1]
    if isinstance(target, Vector):
        raise UnknownInstruction(x.text)
    floating = kind in ("f32", "f64", "bf16", "f16")
    values = read(first, kind), read(second, kind)
    if "ftz" in x.parts:
        values = flush(values[0]), flush(values[1])
    result = _compared(x.parts[1], *values, floating)
    if third:
        result = _LOGIC[x.parts[2]](result, read(third[0], "pred"))
    machine.registers.write(target, result, active)


# Arithmetic.

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_INTEGER = {**_LOGIC, "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}


def _shifted(name: str, x: NDArray, amount: NDArray) -> NDArray:
    """Shifts by the width or more leave nothing (of a negative number going right, its sign)."""
    width = 8 * x.dtype.itemsize
    large = amount >= width
    amount = np.where(large, width - 1, amount).astype(x.dtype)
    if name == "shr":
        shifted = x >> amount
        return np.where(large & (x.dtype.kind == "u"), x.dtype.type(0), shifted)
    return np.where(large, x.dtype.type(0), x << amount)


def _multiplied(parts: tuple[str, ...], x: NDArray, y: NDArray) -> NDArray:
    if parts[1] == "lo":
        return x * y
    wide = np.dtype(f"{x.dtype.kind}{2 * x.dtype.itemsize}")
    product = x.astype(wide) * y.astype(wide)
    if parts[1] == "wide":
        return product
    return (product >> wide.type(8 * x.dtype.itemsize)).astype(x.dtype)  # hi


def _integer(machine: Machine, x: Instruction, active: Active) -> None:
    read, name, kind = machine.registers.read, x.parts[0], x.parts[-1]
    target, first, *others = x.operands
    value = read(first, kind)
    if name in _INTEGER:
        result = _INTEGER[name](value, read(others[0], kind))
    elif name in ("shl", "shr"):
        result = _shifted(name, value, read(others[0], "u32"))
    elif name in ("mul", "mad"):
        result = _multiplied(x.parts, value, read(others[0], kind))
        if name == "mad":
            sum_kind = f"{kind[0]}{8 * result.dtype.itemsize}"
            result = result + read(others[1], sum_kind)
    elif name == "bfe" and kind == "u32":
        place, length = (read(operand, "u32") for operand in others)
        result = _shifted("shr", value, place) & (_shifted("shl", np.ones_like(value), length) - 1).astype(value.dtype)
    elif name == "popc":
        result = np.bitwise_count(value)
    elif name == "not":
        result = ~value
    elif name in ("neg", "abs"):
        result = -value if name == "neg" else np.abs(value)
    else:
        raise UnknownInstruction(x.text)
    machine.registers.write(target, result, active)


def _extreme(name: str, keeps_nan: bool) -> Callable[[NDArray, NDArray], NDArray]:
    if keeps_nan:
        return np.maximum if name == "max" else np.minimum
    return np.fmax if name == "max" else np.fmin


#: Approximate instructions, of float64.
_APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


def _float(machine: Machine, x: Instruction, active: Active) -> None:
    name = x.parts[0]
    target, *operands = x.operands
    values = [machine.registers.read(operand, "f32") for operand in operands]
    ftz = "ftz" in x.parts
    if ftz:
        values = [flush(value) for value in values]
    if name == "fma":
        result = fma(*values)
    elif name in _APPROXIMATE:
        exact = _APPROXIMATE[name](*(value.astype(np.float64) for value in values))
        rounded_exactly = "rn" in x.parts
        result = exact.astype(np.float32) if rounded_exactly else machine.approximate(np.asarray(exact))
    elif name in ("max", "min"):
        result = _extreme(name, "NaN" in x.parts)(*values)
    else:
        result = _ARITHMETIC[name](*values)
    machine.registers.write(target, (flush(result) if ftz else result).astype(np.float32), active)


def _absolute_half(machine: Machine, x: Instruction, active: Active) -> None:
    """|x| of 16-bit floats of either kind: without the sign."""
    target, source = x.operands
    machine.registers.write(target, machine.registers.read(source, "u16") & np.uint16(0x7FFF), active)


def _double(machine: Machine, x: Instruction, active: Active) -> None:
    name = x.parts[0]
    target, *operands = x.operands
    values = [machine.registers.read(operand, "f64") for operand in operands]
    result = np.asarray(_DOUBLES[name](*values))
    machine.registers.write(target, coarse(result) if "approx" in x.parts else result, active)


_ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "abs": np.abs}
_DOUBLES = {**_ARITHMETIC, "fma": fma_double, "rcp": np.reciprocal}
_FLOATS = {"add", "sub", "mul", "fma", "max", "min", "neg", "abs", *_APPROXIMATE}
_OTHERS: dict[str, Execute] = {
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrices,
    "shfl": _shuffle,
    "redux": _reduce,
    "mov": _move,
    "selp": _select,
    "cvt": _convert,
    "setp": _set_predicate,
}


def executor(x: Instruction) -> Execute:
    """The function that executes an instruction.

    Raises:
        UnknownInstruction: for one that is not emulated.
    """
    name, kind = x.parts[0], x.parts[-1]
    if name in _OTHERS:
        return _OTHERS[name]
    if name == "abs" and kind in ("bf16", "f16"):
        return _absolute_half
    if kind == "f32" and name in _FLOATS:
        return _float
    if kind == "f64" and name in _DOUBLES:
        return _double
    if (
        kind in KINDS
        and KINDS[kind].kind != "f"
        and name in {*_INTEGER, "shl", "shr", "mul", "mad", "not", "neg", "abs", "popc", "bfe"}
    ):
        return _integer
    raise UnknownInstruction(x.text)
