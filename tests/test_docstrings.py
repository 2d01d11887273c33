"""Every public function and class says what each parameter is, the shapes of its tensors, and the errors it raises."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import pytest
from torch import Tensor

import vgs
import vgs_kernels

ENTRY = re.compile(r"(\*{0,2}\w+(?:,\s+\*{0,2}\w+)*)(?: \([^)]*\))?: *(.*)", re.DOTALL)
HEADING = re.compile(r"^(\w+):$", re.MULTILINE)
SHAPE = re.compile(r"\[[^\]]+\]|0-d|any shape|as in|see ")  # ... or where to read it
PUBLIC = [(package.__name__, name) for package in (vgs_kernels, vgs) for name in sorted(package.__all__)]


def sections(text: str) -> dict[str, dict[str, str]]:
    """Google-style sections of a docstring: heading -> name -> description. ``a, b: ...`` describes both."""
    parts = HEADING.split(inspect.cleandoc(text or ""))
    found = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        indented = list(takewhile(lambda line: not line or line[0].isspace(), body.strip("\n").splitlines()))
        lines: list[str] = []
        for line in textwrap.dedent("\n".join(indented)).splitlines():
            if line and not line[0].isspace():
                lines.append(line)
            elif lines:
                lines[-1] += "\n" + line
        entries = (match for line in lines if (match := ENTRY.match(line)))
        found[heading] = {name.strip("*"): match[2] for match in entries for name in re.split(r",\s+", match[1])}
    return found


def is_ours(thing: Any) -> bool:
    return (getattr(thing, "__module__", "") or "").split(".")[0] in ("vgs", "vgs_kernels", __name__)


def parameters(public: Any) -> dict[str, str]:
    """Parameter or field -> its annotation as text: what the docstring must describe."""
    if inspect.isclass(public):
        if dataclasses.is_dataclass(public) or hasattr(public, "_fields"):
            own = vars(public).get("__annotations__", {})
            return {name: str(kind) for name, kind in own.items() if name[0] != "_" and "ClassVar" not in str(kind)}
        public = vars(public).get("__init__")
    if public is None:
        return {}
    signature = inspect.signature(public).parameters.values()
    return {x.name: str(x.annotation) for x in signature if x.name not in ("self", "cls")}


def functions_of(public: Any) -> Iterator[Callable]:
    """What runs when a public name is called: itself, or a class's set-up with its own methods that it calls."""
    if not inspect.isclass(public):
        yield public
        return
    waiting, seen = ["__init__", "__post_init__"], set()
    while waiting:
        name = waiting.pop()
        method = vars(public).get(name)
        if (
            name in seen
            or not inspect.isfunction(method)
            or not is_ours(method)
            or "<string>" in method.__code__.co_filename
        ):
            continue  # a dataclass writes an __init__ that has no source
        seen.add(name)
        yield method
        waiting += re.findall(r"\bself\.(\w+)\(", inspect.getsource(method))


def errors_of(function: Callable, depth: int = 1) -> set[type]:
    """Classes of the errors that a function raises, or that functions of ours which it calls by name raise."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    names = inspect.unwrap(function).__globals__

    def look_up(node: ast.expr) -> Any:
        if isinstance(node, ast.Attribute):
            return getattr(look_up(node.value), node.attr, None)
        if isinstance(node, ast.Name):
            return names.get(node.id, getattr(builtins, node.id, None))
        return None

    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = look_up(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
            if inspect.isclass(error):
                found.add(error)
        elif isinstance(node, ast.Call) and depth:
            called = look_up(node.func)
            if inspect.isfunction(called) and is_ours(called):
                found |= errors_of(called, depth - 1)
    return found


def missing(public: Any) -> list[str]:
    """One sentence for each thing that a public name's docstring does not say."""
    if not (inspect.isclass(public) or inspect.isroutine(public)):
        return []  # data, such as a table of presets, is described where it is defined
    texts = [public.__doc__ or ""]
    if inspect.isclass(public) and "__init__" in vars(public):
        texts.append(public.__init__.__doc__ or "")
    if not texts[0].strip() or (hasattr(public, "_fields") and texts[0].startswith(f"{public.__name__}(")):
        return ["it has no docstring"]
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        for heading, entries in sections(text).items():
            found.setdefault(heading, {}).update(entries)
    described = {**found.get("Args", {}), **found.get("Attributes", {})}
    gaps = []
    for name, kind in parameters(public).items():
        if name not in described:
            gaps.append(f"{name} is not described under Args or Attributes")
        elif re.match(r"(torch\.)?Tensor\b", kind) and not SHAPE.search(described[name]):
            gaps.append(f"{name} is a tensor whose shape is not given, such as [N, D]")
    named = set(found.get("Raises", {}))
    errors = set().union(*(errors_of(function) for function in functions_of(public)))
    for error in sorted(errors, key=lambda error: error.__name__):
        if not named & {base.__name__ for base in error.__mro__ if base not in (Exception, BaseException, object)}:
            gaps.append(f"it raises {error.__name__}, which is not named under Raises")
    return gaps


@pytest.mark.parametrize(("package", "name"), PUBLIC)
def test_a_public_name_is_described(package, name):
    gaps = missing(getattr({"vgs": vgs, "vgs_kernels": vgs_kernels}[package], name))
    assert not gaps, f"{package}.{name}: " + "; ".join(gaps)


# That it can fail.


def refuse(count: int) -> None:
    raise ValueError(f"count must be positive, got {count}.")


def complete(rows: Tensor, count: int, **options: Any) -> Tensor:
    """Rows, checked.

    Args:
        rows: [N, D] hidden
            states.
        count: how many.
        **options: not read.

    Raises:
        ValueError: count is not positive.
    """
    refuse(count)
    return rows


def without_words(rows): ...


def without_a_parameter(rows: Tensor, count: int) -> None:
    """Args in the text, count too, but no entry.

    Args:
        rows: [N], count of them.
    """


def without_a_shape(rows: Tensor | None) -> None:
    """Nothing.

    Args:
        rows: hidden states.
    """


def without_its_error(count: int) -> None:
    """Raises a helper's error.

    Args:
        count: how many.
    """
    refuse(count)


def with_another_error(count: int) -> None:
    """As before.

    Args:
        count: how many.

    Raises:
        TypeError: never.
    """
    if count:
        raise KeyError(count)


@dataclasses.dataclass
class Settings:
    """Two knobs.

    Attributes:
        first: described.
    """

    first: int = 0
    second: int = 0

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        raise ValueError("no")


class Pair(NamedTuple):
    first: int


class Plain:
    """A class.

    Args:
        value: described.
    """

    def __init__(self, value: int, other: int) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("public", "gaps"),
    [
        (complete, []),
        ({"data": 1}, []),
        (without_words, ["no docstring"]),
        (without_a_parameter, ["count is not described"]),
        (without_a_shape, ["rows is a tensor whose shape"]),
        (without_its_error, ["raises ValueError"]),
        (with_another_error, ["raises KeyError"]),
        (Settings, ["second is not described", "raises ValueError"]),
        (Pair, ["no docstring"]),
        (Plain, ["other is not described"]),
    ],
)
def test_a_gap_is_found(public, gaps):
    found = missing(public)
    assert len(found) == len(gaps), found
    assert all(part in sentence for part, sentence in zip(gaps, found, strict=True)), found


def test_the_errors_own_parent_will_do():
    def narrow() -> None:
        """Nothing.

        Raises:
            LookupError: always.
        """
        raise KeyError("x")

    assert not missing(narrow)
