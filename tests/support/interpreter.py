"""Triton's interpreter without its idle work.

The interpreter replaces the functions of ``triton.language`` before it runs a kernel, and again before every call of
another ``@triton.jit`` function inside that kernel, although they are replaced already. That takes more than half of a
small launch. Here they are replaced once a launch. Nothing else changes, so numbers stay the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def patch_once_a_launch() -> Callable[[], None]:
    """Speed the interpreter up; returns what undoes it. Does nothing where Triton has no such hooks."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return lambda: None
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor")):
        return lambda: None
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # modules whose functions this launch has called, by the address of their globals

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # a call inside of a kernel does not look at it
        patched.add(module)
        return patch(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    def undo() -> None:
        interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, call
    return undo


@contextmanager
def original_interpreter(undo: Callable[[], None]) -> Iterator[None]:
    """Triton's own interpreter for a while."""
    undo()
    try:
        yield
    finally:
        patch_once_a_launch()
