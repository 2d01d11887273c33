"""Triton's interpreter without its idle work.

The interpreter replaces the functions of ``triton.language`` before it runs a kernel, and again before every call of
another ``@triton.jit`` function inside that kernel, although they are replaced already. That takes more than half of a
small launch. Here they are replaced once a launch. Nothing else changes, so numbers stay the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

try:
    from triton.runtime import interpreter
except ImportError:  # no Triton on this platform
    interpreter = None

#: Where Triton has these private hooks; elsewhere its interpreter stays as it is.
_HAS_HOOKS = hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor")
_ORIGINAL = (interpreter._patch_lang, interpreter.GridExecutor.__call__) if _HAS_HOOKS else None


def _set(patch: Any, launch: Any) -> None:
    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch, launch


def patch_once_a_launch() -> None:
    """Speed the interpreter up, in this process."""
    if not _HAS_HOOKS:
        return
    patch, launch = _ORIGINAL
    patched: set[int] = set()  # modules whose functions this launch has called, by the address of their globals

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None  # only a launch itself looks at it
        patched.add(module)
        return patch(function)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            patched.clear()

    _set(patch_once, call)


@contextmanager
def original_interpreter() -> Iterator[None]:
    """Triton's own interpreter for a while."""
    if not _HAS_HOOKS:
        yield
        return
    quick = interpreter._patch_lang, interpreter.GridExecutor.__call__
    _set(*_ORIGINAL)
    try:
        yield
    finally:
        _set(*quick)
