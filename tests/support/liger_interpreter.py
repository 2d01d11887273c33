"""Liger's kernels in Triton's interpreter, without a GPU; to be imported before Triton and Liger are."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language.extra import libdevice

CONVERT = interpreter._implicit_cvt


def converted(value: Any) -> Any:
    """A kernel's argument. The compiler makes float32 scalars of floats; the interpreter leaves them as Python's."""
    if not isinstance(value, float):
        return CONVERT(value)
    return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)


interpreter._implicit_cvt = converted
# The interpreter has no libdevice: its functions return None there.
libdevice.rsqrt, libdevice.tanh = lambda x: 1 / tl.sqrt(x), lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
