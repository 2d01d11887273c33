"""Sizes of the tiles, and how they lie in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm import has_mixed_gemm

#: Rows of a gradient block: enough for one full wave of a GEMM on a large GPU, few passes over the head gradient.
_GRADIENT_ROWS = 2048
#: Fewer rows than these starve the projections: cut the vocabulary instead.
_MIN_ROWS, _CUT_ROWS, _MIN_COLUMNS = 32, 128, 128
#: Whole GEMM tiles: no tensor-core tile is left partly empty except at the last token.
_ROW_MULTIPLE = 64
_PITCH_COLUMNS = 64


def pitch(columns: int) -> int:
    """Elements from one row of a slab to the next: rows begin at multiples of 128 bytes whatever the vocabulary."""
    return math.ceil(columns / _PITCH_COLUMNS) * _PITCH_COLUMNS


def slab_rows(slab: Tensor, rows: slice, columns: int) -> Tensor:
    """These rows of a slab, [R, columns]."""
    width = pitch(columns)
    return slab[rows.start * width : rows.stop * width].view(-1, width)[:, :columns]


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of logit gradients: 16 bits only where a GEMM takes 16-bit operands and keeps a float32 result."""
    if has_mixed_gemm(hidden.device, hidden.dtype) or hidden.dtype == torch.float64:
        return hidden.dtype
    return torch.float32


@dataclass
class GradientView:
    """Hidden states of the student whose logits receive gradient.

    Attributes:
        hidden: [N, D].
        d_hidden: their gradient, or None where not required. Overwritten where the view has logit gradients.
        alpha: factor on the gradients of this view, kept out of 16-bit logit gradients.
        compact: only tokens with a language weight have logit gradients, and these lie one after the other.
    """

    hidden: Tensor
    d_hidden: Tensor | None
    alpha: float = 1.0
    compact: bool = False

    @property
    def in_place(self) -> bool:
        """Whether logit gradients overwrite the logits, which have the same dtype."""
        return gradient_dtype(self.hidden).itemsize >= 4 and not self.compact


@dataclass(frozen=True)
class Plan:
    """Sizes of the tiles: tokens and columns of a projection, tokens of a gradient block."""

    rows: int
    columns: int
    gradient_rows: int

    @classmethod
    def of(cls, n: int, vocab: int, slab_bytes: int, views: Sequence[GradientView], workspace_bytes: int) -> Plan:
        """Largest tiles within the workspace, for slabs of that many bytes for each token and column."""
        own = [view for view in views if not view.in_place]
        gradient_bytes = sum(gradient_dtype(view.hidden).itemsize for view in own)
        if len(own) < len(views):  # tied to the slabs' tokens by the views that lie in them
            slab_bytes, gradient_bytes = slab_bytes + gradient_bytes, 0
        return cls.fit(n, vocab, slab_bytes, gradient_bytes, workspace_bytes)

    @classmethod
    def fit(cls, n: int, vocab: int, slab_bytes: int, gradient_bytes: int, workspace_bytes: int) -> Plan:
        """Largest tiles within the workspace; the bytes are those of one token and one column."""
        n, width = max(n, 1), pitch(vocab)
        rows = workspace_bytes // (width * slab_bytes)
        gradient_rows = n
        if gradient_bytes:  # at most half of the workspace for the gradient block
            gradient_rows = min(n, _GRADIENT_ROWS, workspace_bytes // (2 * width * gradient_bytes))
            rows = (workspace_bytes - gradient_rows * width * gradient_bytes) // (width * slab_bytes)
        rows = min(rows, gradient_rows)
        if rows < min(n, _MIN_ROWS):
            rows = min(n, _CUT_ROWS)
            columns = workspace_bytes // (rows * (slab_bytes + gradient_bytes)) // _MIN_COLUMNS * _MIN_COLUMNS
            return cls(rows, min(max(columns, _MIN_COLUMNS), vocab), rows)
        if _ROW_MULTIPLE < rows < n:
            rows -= rows % _ROW_MULTIPLE
            even = math.ceil(n / math.ceil(n / rows))  # no small remainder behind large tiles
            rows = math.ceil(even / _ROW_MULTIPLE) * _ROW_MULTIPLE
        return cls(rows, vocab, gradient_rows // rows * rows if gradient_bytes else rows)
