"""Validation of arguments: every message names the argument, what came, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .heads import Head

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Who may work on logit rows, see :mod:`vgs_kernels.rows`.
BACKENDS = ("auto", "triton", "torch", "loops")
#: What a number may have to be, beside finite.
BOUNDS = {
    "> 0": lambda x: x > 0,
    ">= 0": lambda x: x >= 0,
    ">= 1": lambda x: x >= 1,
    "in [0, 1]": lambda x: 0 <= x <= 1,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


def instance(name: str, value: Any, kind: type, *, optional: bool = False) -> None:
    """Check the type; True is no int."""
    wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
    if wrong and not (optional and value is None):
        expected = f"{'torch.' if kind is Tensor else ''}{kind.__name__}{' or None' if optional else ''}"
        raise TypeError(f"{name} must be {'an' if kind is int else 'a'} {expected}, got {type(value).__name__}.")


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}.")


def number(name: str, value: float | None, must_be: str | None = None, *, optional: bool = False) -> float | None:
    """Check a finite number, within one of ``BOUNDS``; None is one only if ``optional``."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not -math.inf < value < math.inf:  # of a number that is symbolic under torch.compile, too
        raise ValueError(f"{name} must be finite, got {value}.")
    if must_be is not None and not BOUNDS[must_be](value):
        raise ValueError(f"{name} must be {must_be}, got {value}.")
    return float(value)


def integer(name: str, value: int, must_be: str | None = None) -> int:
    instance(name, value, int)
    number(name, value, must_be)
    return value


def sequence(name: str, value: Any, of: str, lengths: Sequence[int] | None = None) -> Sequence[Any]:
    """Check a list, tuple or the like that is not empty, or of one of these lengths."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {of}, got {type(value).__name__}.")
    if not value or (lengths is not None and len(value) not in lengths):
        raise ValueError(f"{name} must be {of}, got {len(value)} entries.")
    return value


def tensor(
    name: str,
    value: Tensor,
    shape: Sequence[int | None] | None,
    like: Tensor | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> None:
    """Check a tensor's sizes (None: any; no shape: two dimensions or more), dtype and, against ``like``, device."""
    instance(name, value, Tensor)
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} is a DTensor; gather it once and pass a plain tensor ({name}.full_tensor()).")
    got, wanted = tuple(value.shape), shape
    if wanted is None:
        wanted = (None,) * max(len(got), 2)
    if len(got) != len(wanted) or any(size not in (None, x) for size, x in zip(wanted, got, strict=True)):
        shown = "(..., D)" if shape is None else str(tuple("*" if x is None else x for x in shape)).replace("'", "")
        raise ValueError(f"{name} must have shape {shown}, got {got}.")
    if value.dtype not in dtypes:
        expected = "a floating dtype" if dtypes is FLOATS else f"dtype {dtypes[0]}"
        raise TypeError(f"{name} must be of {expected}, got {value.dtype}.")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}.")


def per_token(name: str, value: Tensor | None, like: Tensor, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor | None:
    """Check an optional tensor with one entry for each token of ``like`` [..., D]; returns [N]."""
    if value is None:
        return None
    tensor(name, value, like.shape[:-1], like, dtypes)
    return value.detach().reshape(-1)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts a linear layer's inputs to; it leaves float64 alone."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def head(name: str, given: Tensor | Head, hidden: Tensor, *loose: Any, shard: bool) -> Head:
    """Check a head, or a bare weight and its (bias, scale, softcap), against hidden states [..., D].

    Only a shard may have no column.
    """
    others = [x for x, default in zip(loose, (None, 1.0, None), strict=False) if x is not default and x != default]
    if isinstance(given, Head) and others:
        raise ValueError(f"{name} is a Head, which has its own bias, scale and softcap, got others beside it.")
    value = given if isinstance(given, Head) else Head(given, *loose)
    weight, prefix = value.weight, name.removesuffix("weight")
    if isinstance(weight, Tensor) and weight.numel() == 0 and not shard:
        raise ValueError(
            f"{name} is empty, got shape {tuple(weight.shape)}; expected (V, {hidden.shape[-1]}). "
            "A head sharded by ZeRO-3 must be gathered before the call."
        )
    tensor(name, weight, (None, hidden.shape[-1]), like=hidden)
    if value.bias is not None:
        tensor(f"{prefix}bias", value.bias, (weight.shape[0],), like=hidden)
    number(f"{prefix}softcap", value.softcap, "> 0", optional=True)
    number(f"{prefix}logit_scale", value.scale, "> 0")
    return value


def vocabulary(columns: dict[str, int], vocab_size: int | None) -> int:
    """The number of columns to use, given those of each head."""
    sizes = ", ".join(f"{name} has {size}" for name, size in columns.items())
    if vocab_size is None and len(set(columns.values())) > 1:
        raise ValueError(
            f"the heads must have the same vocabulary: {sizes}. If the additional columns are padding, "
            "say so with vocab_size."
        )
    return _at_most(vocab_size, min(columns.values()), sizes)


def _at_most(vocab_size: int | None, most: int, sizes: str) -> int:
    if vocab_size is not None and not 1 <= vocab_size <= most:
        raise ValueError(f"vocab_size must lie in [1, {most}], got {vocab_size}: {sizes}.")
    return most if vocab_size is None else vocab_size


def shards(sizes: Sequence[Sequence[int]], vocab_size: int | None) -> list[int]:
    """The number of columns that each rank of a vocabulary group uses, given those of each head on each rank."""
    shown = ", ".join(f"rank {rank} has {' and '.join(map(str, dict.fromkeys(x)))}" for rank, x in enumerate(sizes))
    if any(len(set(x)) > 1 for x in sizes):
        raise ValueError(
            f"student_weight and the target's weights must have the same columns on each rank of vocab_group: {shown}."
        )
    total = sum(x[0] for x in sizes)
    if not total:
        raise ValueError("student_weight must have a column on one rank of vocab_group at least, got none.")
    left, used = _at_most(vocab_size, total, shown), []
    for count, *_ in sizes:
        used.append(min(count, left))
        left -= used[-1]
    return used


def readable(x: Tensor) -> bool:
    """Whether looking at a tensor costs nothing: it is on a CPU, holds numbers, and nobody compiles."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def ids_in_vocabulary(name: str, ids: Tensor | None, ignored: Tensor | None, vocab: int | None) -> None:
    """Where looking costs nothing; elsewhere an id outside the vocabulary has log-probability -inf."""
    if ids is None or vocab is None or not readable(ids):
        return
    seen = ids if ignored is None else ids[~ignored]
    if seen.numel() and not 0 <= seen.min() <= seen.max() < vocab:
        raise ValueError(f"{name} must lie in [0, {vocab}), got values from {seen.min()} to {seen.max()}.")


def backend(name: str, *tensors: Tensor) -> str:
    """Resolve "auto" and check that a backend can run on the tensors' device and dtypes.

    On a CPU "auto" remains: whether there is a compiler is found out by the operator, which no tracer looks into.
    """
    choice("backend", name, BACKENDS)
    on, double = tensors[0].device, any(x.dtype == torch.float64 for x in tensors)
    if name == "torch" or on.type == "meta" or (name == "auto" and (on.type not in ("cuda", "cpu") or double)):
        return "torch"
    if name == "loops" and (on.type != "cpu" or double):
        got = "torch.float64" if double else on
        raise ValueError(f"backend='loops' is for float32 and 16 bits on a CPU, got {got}: use backend='auto'.")
    if on.type == "cpu" and name in ("auto", "loops"):
        return name
    try:
        from .rows import rows_triton
    except ImportError as error:
        if name == "auto":
            return "torch"
        raise ValueError(f"backend='triton' needs the triton package: {error}.") from error
    if name == "auto":
        return "triton" if rows_triton.supports(on) else "torch"
    if double:
        raise ValueError("backend='triton' has no float64, got torch.float64: use backend='torch'.")
    if not rows_triton.supports(on):
        raise ValueError(
            "backend='triton' needs a CUDA device of capability 8 or more, or a ROCm device (or TRITON_INTERPRET=1), "
            f"got {on}."
        )
    return "triton"
