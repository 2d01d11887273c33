"""Validation of the public functions' arguments: every message names the argument, what came, what was expected."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None) -> Tensor:
    """Check a floating tensor's rank, sizes (None: any), and, against ``like``, its dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}.")
    if hasattr(value, "full_tensor"):
        raise TypeError(f"{name} is a DTensor; gather it once and pass a plain tensor ({name}.full_tensor()).")
    expected = tuple("*" if size is None else size for size in shape)
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        shown = str(expected).replace("'", "")
        raise ValueError(f"{name} must have shape {shown}, got {tuple(value.shape)}.")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}.")
    if like is not None:
        device(name, value, like)
        if compute_dtype(value) != compute_dtype(like):
            raise TypeError(f"{name} must have dtype {like.dtype} like the student's, got {value.dtype}.")
    return value


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer would compute in: autocast's where it is on, which leaves float64 alone."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def head(name: str, value: Tensor, bias_name: str, bias: Tensor | None, hidden: Tensor, *, shard: bool = False) -> None:
    """Check a head's weight [V, D] and bias [V] against hidden states [N, D]. Only a shard may have no column."""
    if isinstance(value, Tensor) and value.numel() == 0 and not shard:
        raise ValueError(
            f"{name} is empty, got shape {tuple(value.shape)}; expected (V, {hidden.shape[1]}). "
            "A head sharded by ZeRO-3 must be gathered before the call."
        )
    tensor(name, value, (None, hidden.shape[1]), like=hidden)
    if bias is not None:
        tensor(bias_name, bias, (value.shape[0],), like=hidden)


def device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}.")


def per_token(name: str, value: Tensor | None, like: Tensor, *, integer: bool = False) -> Tensor | None:
    """Check an optional [N] vector: floating, or int64."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(value).__name__}.")
    if tuple(value.shape) != (len(like),):
        raise ValueError(f"{name} must have shape ({len(like)},), one entry a token, got {tuple(value.shape)}.")
    if integer and value.dtype != torch.int64:
        raise TypeError(f"{name} must be of dtype torch.int64, got {value.dtype}.")
    if not integer and value.dtype not in FLOATS:
        raise TypeError(f"{name} must be of a floating dtype, got {value.dtype}.")
    device(name, value, like)
    return value.detach()


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


def ids_in_vocabulary(name: str, ids: Tensor | None, vocab: int | None) -> None:
    """On a CPU, where looking costs nothing; elsewhere an id outside the vocabulary has log-probability -inf."""
    if (
        ids is not None
        and vocab is not None
        and ids.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and ids.numel()
    ):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise ValueError(f"{name} must lie in [0, {vocab}), got values from {low} to {high}.")


def backend(name: str, like: Tensor) -> str:
    """Resolve "auto" and check that a backend can run on the tensor's device and dtype."""
    if name not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be one of auto, triton, torch, got {name!r}.")
    if name == "torch" or (name == "auto" and (like.device.type != "cuda" or like.dtype == torch.float64)):
        return "torch"
    try:
        from . import rows_triton
    except ImportError as error:
        if name == "auto":
            return "torch"
        raise ValueError(f"backend='triton' needs the triton package: {error}.") from error
    if like.dtype == torch.float64:
        raise ValueError("backend='triton' has no float64, got torch.float64: use backend='torch'.")
    if not rows_triton.supports(like.device):
        raise ValueError(f"backend='triton' needs a CUDA or ROCm device (or TRITON_INTERPRET=1), got {like.device}.")
    return "triton"


def workspace(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"workspace_bytes must be an int, got {type(value).__name__}.")
    if value <= 0:
        raise ValueError(f"workspace_bytes must be > 0, got {value}.")
    return value
