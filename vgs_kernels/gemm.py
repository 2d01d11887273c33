"""Matrix products with 16-bit operands and a float32 result that is never rounded to 16 bits on the way."""

from __future__ import annotations

import torch
from torch import Tensor

#: Vocabulary columns converted to float32 at a time where the device has no mixed-precision product.
_UPCAST_COLUMNS = 8192


def has_mixed_gemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether 16-bit operands can be multiplied into a float32 result without converting them first."""
    return device.type == "cuda" and torch.version.hip is None and dtype in (torch.bfloat16, torch.float16)


def _accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float, keep: bool) -> None:
    """out = keep * out + alpha * a @ b."""
    mixed = {"out_dtype": out.dtype} if a.dtype != out.dtype else {}
    if alpha == 1.0 and not keep:
        torch.mm(a, b, **mixed, out=out)
    else:
        torch.addmm(out, a, b, **mixed, beta=float(keep), alpha=alpha, out=out)


def _direct(out: Tensor, a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and (a.dtype == out.dtype or has_mixed_gemm(out.device, a.dtype))


def project(hidden: Tensor, weight: Tensor, out: Tensor, *, alpha: float = 1.0, keep: bool = False) -> None:
    """Logits: out [R, C] = keep * out + alpha * hidden [R, D] @ weight [C, D]^T, in the precision of ``out``."""
    if _direct(out, hidden, weight):
        return _accumulate(out, hidden, weight.t(), alpha, keep)
    hidden = hidden.to(out.dtype)
    for part, columns in zip(weight.split(_UPCAST_COLUMNS), out.split(_UPCAST_COLUMNS, dim=1), strict=True):
        _accumulate(columns, hidden, part.to(out.dtype).t(), alpha, keep)


def add_hidden_gradient(d_logits: Tensor, weight: Tensor, out: Tensor) -> None:
    """out [R, D] += d_logits [R, C] @ weight [C, D]."""
    if _direct(out, d_logits, weight):
        return _accumulate(out, d_logits, weight, 1.0, keep=True)
    for part, columns in zip(weight.split(_UPCAST_COLUMNS), d_logits.split(_UPCAST_COLUMNS, dim=1), strict=True):
        _accumulate(out, columns.to(out.dtype), part.to(out.dtype), 1.0, keep=True)


def add_weight_gradient(d_logits: Tensor, hidden: Tensor, out: Tensor) -> None:
    """out [C, D] += d_logits [R, C]^T @ hidden [R, D]."""
    if not _direct(out, d_logits, hidden):
        d_logits, hidden = d_logits.to(out.dtype), hidden.to(out.dtype)
    _accumulate(out, d_logits.t(), hidden, 1.0, keep=True)
