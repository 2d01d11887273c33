"""Reads PTX, the assembly of NVIDIA's GPUs, as far as Triton writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    """A number as its bits; ``is_float`` tells 0f3F800000 from 1065353216."""

    value: int
    is_float: bool = False


class Symbol(NamedTuple):
    """A label, a parameter, or an array in shared memory."""

    name: str


class Address(NamedTuple):
    base: Register | Symbol | Immediate
    offset: int


class Vector(NamedTuple):
    """``{%r1, %r2}``, or the pair of predicates ``%p1|%p2``."""

    items: tuple[Register | Immediate | Symbol, ...]


Operand: TypeAlias = Register | Immediate | Symbol | Address | Vector


class Instruction(NamedTuple):
    """One instruction: executed where ``predicate`` holds, or where it does not if ``negated``.

    ``parts`` is the opcode cut at its dots; ``text`` and ``where`` (file:line:column of the kernel) are for messages.
    """

    predicate: Register | None
    negated: bool
    opcode: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str
    where: str


@dataclass
class Program:
    """One kernel.

    Attributes:
        name: of the kernel.
        threads: of a block.
        parameters: name -> size in bytes, in their order.
        code: instructions; ``labels`` points into it.
        labels: label -> index of the instruction behind it.
        shared: array in shared memory -> its first byte.
    """

    name: str
    threads: int
    parameters: dict[str, int]
    code: list[Instruction]
    labels: dict[str, int]
    shared: dict[str, int] = field(default_factory=dict)


class SyntaxFault(Exception):
    """Text that this reader does not know."""


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.[a-z](\d+)\b.*?([\w$]+)\s*(?:,|$)", re.MULTILINE)
_SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\s*\[(\d*)\]")
_LOCAL = re.compile(r"\.reg\s+\.\w+\s+([A-Za-z]\w*)\s*;")
_LABEL = re.compile(r"([\w$]+):\s*")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_ADDRESS = re.compile(r"\[\s*(%?[\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_WHERE = re.compile(r"//\s*(\S+:\d+:\d+)")


def _number(text: str) -> Immediate | None:
    if re.fullmatch(r"0[fFdD][0-9A-Fa-f]{8,16}", text):
        return Immediate(int(text[2:], 16), is_float=True)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return None


def _atom(text: str) -> Register | Immediate | Symbol:
    text = text.strip()
    if text.startswith("%"):
        return Register(text)
    return _number(text) or Symbol(text)


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return Vector(tuple(_atom(item) for item in text[1:-1].split(",")))
    if text.startswith("["):
        match = _ADDRESS.match(text)
        if match is None:
            raise SyntaxFault(f"no address is known that looks like {text}")
        return Address(_atom(match[1]), int(match[2] or "0", 0))
    if "|" in text:
        return Vector(tuple(_atom(item) for item in text.split("|")))
    return _atom(text)


def _operands(text: str) -> Iterator[Operand]:
    """Cut at the commas outside of brackets."""
    depth, current = 0, ""
    for character in text:
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and not depth:
            yield _operand(current)
            current = ""
        else:
            current += character
    if current.strip():
        yield _operand(current)


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """(statement without its semicolon or label with its colon, place in the kernel's source)."""
    where, current = "", ""
    for line in body.splitlines():
        if line.lstrip().startswith(".loc"):
            found = _WHERE.search(line)
            where = found[1] if found else where
            continue
        line = line.partition("//")[0].strip()
        if re.fullmatch(r"[\w$]+:", line):
            yield line, where
            continue
        pieces = f"{current} {line}".split(";")
        for piece in pieces[:-1]:
            yield piece.strip(), where
        current = pieces[-1].strip()


def _body(text: str, start: int) -> str:
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    raise SyntaxFault("the kernel does not end")


def parse(text: str) -> Program:
    """The kernel that a PTX file holds.

    Raises:
        SyntaxFault: for text that it does not know.
    """
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    for name in {match[1] for match in _LOCAL.finditer(text)}:
        text = re.sub(rf"(?<![%\w$]){name}\b", f"%{name}", text)
    head = _ENTRY.search(text)
    if head is None:
        raise SyntaxFault("there is no kernel")
    threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", head[3])
    if threads is None:
        raise SyntaxFault("the kernel does not say how many threads it has")
    shared: dict[str, int] = {}
    total = 0
    for match in _SHARED.finditer(text):
        shared[match[1]] = total
        total += int(match[2] or 0)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement, where in _statements(_body(text, head.end())):
        while (label := _LABEL.match(statement)) is not None:
            labels[label[1]] = len(code)
            statement = statement[label.end() :]
        statement = statement.lstrip("{} \t\n").strip()
        if not statement or statement.startswith("."):
            continue
        match = _STATEMENT.match(statement)
        if match is None:
            raise SyntaxFault(f"no instruction is known that looks like {statement}")
        negated, predicate, opcode, rest = match.groups()
        opcode = opcode.replace("::cta", "")  # of a block: what there is without clusters
        code.append(
            Instruction(
                None if predicate is None else Register(predicate),
                bool(negated),
                opcode,
                tuple(opcode.split(".")),
                tuple(_operands(rest)),
                " ".join(statement.split()),
                where,
            )
        )
    parameters = {match[2]: int(match[1]) // 8 for match in _PARAMETER.finditer(head[2])}
    return Program(head[1], int(threads[1]), parameters, code, labels, shared)
