"""Validation of the public functions' arguments: every message names the argument, what came, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .heads import Head

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> Tensor:
    """Check a floating tensor's rank, sizes (None: any), and, against ``like``, its device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} is a DTensor; gather it once and pass a plain tensor ({name}.full_tensor()).")
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        shown = str(tuple("*" if size is None else size for size in shape)).replace("'", "")
        raise ValueError(f"{name} must have shape {shown}, got {tuple(value.shape)}.")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}.")
    if like is not None:
        device(name, value, like)
    return value


def states(name: str, value: Tensor, like: Tensor | None = None, columns: int | None = None) -> Tensor:
    """Check hidden states or logits [..., D] with the leading dimensions of ``like``; returns them as [N, D]."""
    if like is None:
        dims = value.dim() if isinstance(value, Tensor) else 2
        if dims < 2:
            raise ValueError(f"{name} must have shape (..., D), got {tuple(value.shape)}.")
        return tensor(name, value, (None,) * dims).flatten(0, -2)
    return tensor(name, value, (*like.shape[:-1], columns), like).flatten(0, -2)


def columns(logits: dict[str, Tensor]) -> dict[str, int]:
    """The columns of logits [N, V] by name, at least one each."""
    for name, value in logits.items():
        if value.shape[1] == 0:
            raise ValueError(f"{name} must have at least one column, got shape {tuple(value.shape)}.")
    return {name: value.shape[1] for name, value in logits.items()}


def sequence(name: str, value: Any, of: str) -> Sequence[Any]:
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"{name} must be a non-empty sequence of {of}, got {type(value).__name__}.")
    return value


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts a linear layer's inputs to; it leaves float64 alone."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return None


def head(name: str, given: Tensor | Head, hidden: Tensor, *, shard: bool, **loose: Any) -> Head:
    """Check a head against hidden states [..., D]; ``loose`` fields come with a bare weight [V, D] alone.

    Only a shard may have no column.
    """
    if isinstance(given, Head):
        if clash := [field for field, value in loose.items() if value != getattr(Head, field)]:
            raise ValueError(f"{name} is a Head, which has a {clash[0]} of its own, got another.")
        value = given
    else:
        value = Head(given, **loose)
    weight = value.weight
    if isinstance(weight, Tensor) and weight.numel() == 0 and not shard:
        raise ValueError(
            f"{name} is empty, got shape {tuple(weight.shape)}; expected (V, {hidden.shape[-1]}). "
            "A head sharded by ZeRO-3 must be gathered before the call."
        )
    tensor(name, weight, (None, hidden.shape[-1]), like=hidden)
    prefix = name.removesuffix("weight")
    if value.bias is not None:
        tensor(f"{prefix}bias", value.bias, (weight.shape[0],), like=hidden)
    number(f"{prefix}softcap", value.softcap, positive=True, optional=True)
    number(f"{prefix}logit_scale", value.scale, positive=True)
    return value


def device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}.")


def per_token(name: str, value: Tensor | None, like: Tensor, *, integer: bool = False) -> Tensor | None:
    """Check an optional tensor with one entry a token, floating or int64, of ``like`` [..., D]; returns [N]."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}.")
    if value.shape != like.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape[:-1])}, one entry a token, got {tuple(value.shape)}."
        )
    if integer and value.dtype != torch.int64:
        raise TypeError(f"{name} must be of dtype torch.int64, got {value.dtype}.")
    if not integer and value.dtype not in FLOATS:
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}.")
    device(name, value, like)
    return value.detach().reshape(-1)


def index(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")
    return value


def number(name: str, value: float | None, *, positive: bool = False, optional: bool = False) -> float | None:
    """Check a finite number, > 0 if ``positive``; None is one only if ``optional``."""
    if value is None and optional:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if not -math.inf < value < math.inf:  # of a number that is symbolic under torch.compile, too
        raise ValueError(f"{name} must be finite, got {value}.")
    if positive and value <= 0:
        raise ValueError(f"{name} must be > 0, got {value}.")
    return float(value)


def vocabulary(heads: dict[str, int], vocab_size: int | None, *, shard: bool = False) -> int | None:
    """The number of columns to use, given those of each head; of a shard only the ranks together can tell (None)."""
    if vocab_size is not None and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int)):
        raise TypeError(f"vocab_size must be an int or None, got {type(vocab_size).__name__}.")
    if shard:
        return vocab_size
    sizes = ", ".join(f"{name} has {size}" for name, size in heads.items())
    if vocab_size is None:
        if len(set(heads.values())) > 1:
            raise ValueError(
                f"the heads must have the same vocabulary: {sizes}. If the additional columns are padding, "
                "say so with vocab_size."
            )
        return next(iter(heads.values()))
    return _at_most(vocab_size, min(heads.values()), sizes)


def _at_most(vocab_size: int, most: int, sizes: str) -> int:
    if not 1 <= vocab_size <= most:
        raise ValueError(f"vocab_size must lie in [1, {most}], got {vocab_size}: {sizes}.")
    return vocab_size


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
    left = total if vocab_size is None else _at_most(vocab_size, total, shown)
    used = []
    for count, *_ in sizes:
        used.append(min(count, left))
        left -= used[-1]
    return used


def process_group(name: str, value: object) -> None:
    if value is not None and not isinstance(value, torch.distributed.ProcessGroup):
        raise TypeError(f"{name} must be a torch.distributed.ProcessGroup or None, got {type(value).__name__}.")


def readable(x: Tensor) -> bool:
    """Whether looking at a tensor costs nothing: it is on a CPU, holds numbers, and nobody compiles."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor)


def ids_in_vocabulary(name: str, ids: Tensor | None, ignored: Tensor | None, vocab: int | None) -> None:
    """Where looking costs nothing; elsewhere an id outside the vocabulary has log-probability -inf."""
    if ids is None or vocab is None or not readable(ids):
        return
    seen = ids if ignored is None else ids[~ignored]
    if seen.numel():
        low, high = int(seen.min()), int(seen.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"{name} must lie in [0, {vocab}), got values from {low} to {high}.")


def backend(name: str, *tensors: Tensor) -> str:
    """Resolve "auto" and check that a backend can run on the tensors' device and dtypes."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be one of auto, triton, torch, got {name!r}.")
    on, double = tensors[0].device, any(x.dtype == torch.float64 for x in tensors)
    if name == "torch" or on.type == "meta" or (name == "auto" and (on.type != "cuda" or double)):
        return "torch"
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


def workspace(value: int) -> int:
    if index("workspace_bytes", value) <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {value}.")
    return value
