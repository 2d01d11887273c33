"""Matrix products with 16-bit operands and a float32 result that is never rounded to 16 bits on the way."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

#: Vocabulary columns converted to float32 at a time where the device has no mixed-precision product.
UPCAST_COLUMNS = 8192


@functools.cache
def has_mixed_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether 16-bit operands can be multiplied into a float32 result without converting them first.

    Of CUDA and ROCm devices, where this release of torch does it; NVIDIA's have to be of capability 8 or more.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    x = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.mm(x, x, out_dtype=torch.float32)
    except (RuntimeError, TypeError):
        return False
    return True


def _multiply(out: Tensor, a: Tensor, b: Tensor, addend: Tensor | None = None, alpha: float = 1.0) -> None:
    """out = addend + alpha * a @ b, rounded once; ``addend`` may be ``out`` itself, or a row of it."""
    mixed = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    if addend is None and alpha == 1.0:
        torch.mm(a, b, **mixed, out=out)
    elif addend is None:
        torch.addmm(out, a, b, **mixed, beta=0.0, alpha=alpha, out=out)
    else:
        torch.addmm(addend, a, b, **mixed, alpha=alpha, out=out)


def _direct(out: Tensor, a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and (a.dtype == out.dtype or has_mixed_gemm(out.device, a.dtype))


def project(
    hidden: Tensor, weight: Tensor, out: Tensor, *, bias: Tensor | None = None, alpha: float = 1.0, keep: bool = False
) -> None:
    """Logits, out [R, C] = (bias [C] or keep * out) + alpha * hidden [R, D] @ weight [C, D]^T, in its precision."""
    bias = None if bias is None else bias.to(out.dtype)
    if _direct(out, hidden, weight):
        return _multiply(out, hidden, weight.t(), out if keep else bias, alpha)
    hidden = hidden.to(out.dtype)
    for start in range(0, len(weight), UPCAST_COLUMNS):
        columns = slice(start, start + UPCAST_COLUMNS)
        part = out[:, columns]
        addend = part if keep else None if bias is None else bias[columns]
        _multiply(part, hidden, weight[columns].to(out.dtype).t(), addend, alpha)


def add_hidden_gradient(d_logits: Tensor, weight: Tensor, out: Tensor, alpha: float, *, keep: bool) -> None:
    """out [R, D] = keep * out + alpha * d_logits [R, C] @ weight [C, D]."""
    if _direct(out, d_logits, weight):
        return _multiply(out, d_logits, weight, out if keep else None, alpha)
    for part, columns in zip(weight.split(UPCAST_COLUMNS), d_logits.split(UPCAST_COLUMNS, dim=1), strict=True):
        _multiply(out, columns.to(out.dtype), part.to(out.dtype), out if keep else None, alpha)
        keep = True


def add_weight_gradient(d_logits: Tensor, hidden: Tensor, out: Tensor, alpha: float, *, keep: bool) -> None:
    """out [C, D] = keep * out + alpha * d_logits [R, C]^T @ hidden [R, D]."""
    if not _direct(out, d_logits, hidden):
        d_logits, hidden = d_logits.to(out.dtype), hidden.to(out.dtype)
    _multiply(out, d_logits.t(), hidden, out if keep else None, alpha)
