"""What ``vgs_kernels`` must be told to launch its Triton kernels on tensors of the CPU. Nothing else here knows how the
package looks inside.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from unittest import mock

import triton

import vgs_kernels


def allow_cpu() -> None:
    """``backend="triton"`` accepts tensors of the CPU, as it does while Triton interprets."""
    from vgs_kernels.rows import rows_triton

    rows_triton.supports = lambda device: True


@contextlib.contextmanager
def blocks_beside_slots() -> Iterator[None]:
    """16-bit blocks of logit gradients, with slots for text-only ones, as a GPU has them for many tokens."""
    from vgs_kernels import arguments, steering

    with (
        mock.patch.object(arguments, "gradient_dtype", lambda hidden, *_: hidden.dtype),
        mock.patch.object(steering, "_FEW_TOKENS", 0),
    ):
        yield


@contextlib.contextmanager
def bold_guesses(wanted: bool) -> Iterator[None]:
    """Thresholds of a ``gradient_tolerance`` that at first leave too much out, so that tokens are checked again."""
    from vgs_kernels import active_columns

    with mock.patch.object(active_columns, "_CAUTION", 4.0 if wanted else active_columns._CAUTION):
        yield


def kernel_names() -> set[str]:
    """Names of all Triton kernels that the package launches itself: those that nothing else calls."""
    found = set()
    for module in pkgutil.walk_packages(vgs_kernels.__path__, "vgs_kernels."):
        names = vars(importlib.import_module(module.name))
        found |= {name for name, x in names.items() if isinstance(x, triton.JITFunction) and name.endswith("_kernel")}
    return found
