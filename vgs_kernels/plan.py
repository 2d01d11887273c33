"""Sizes of the tiles, and how they lie in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm import has_mixed_gemm
from .rows.layout import quiet

#: Rows of a gradient block: enough for one full wave of a GEMM on a large GPU, few passes over the head gradient.
GRADIENT_ROWS = 2048
#: Tiles of fewer bytes for each column (64 tokens of four float32 rows) cost more in reading the heads than a cut
#: vocabulary costs in projecting twice.
_MIN_TILE_BYTES, _MIN_ROWS = 1024, 64
#: Tiles of a cut vocabulary: tall, for what a block adds to the head gradient is read and written.
_CUT_ROWS, _MIN_CUT_ROWS, _MIN_COLUMNS = 512, 128, 128
#: Whole GEMM tiles: no tensor-core tile is left partly empty except at the last token.
_ROW_MULTIPLE = 64
_PITCH_COLUMNS = 64
#: A CPU's products of more rows, of all views together, gain nothing, and every call pays for the first touch of its
#: slabs; those of half as many take 6 % longer.
MAX_ROWS = {"cpu": 512}
#: What a vocabulary entry costs in memory traffic, in units of the student's width: heads are read once for each tile
#: (the teacher's twice as wide), and once for each gradient block, when the head gradient is read and written as well.
_TILE_TRAFFIC, _BLOCK_TRAFFIC = 6, 10


def pitch(columns: int) -> int:
    """Elements from one row of a slab to the next: rows begin at multiples of 128 bytes whatever the vocabulary."""
    return math.ceil(columns / _PITCH_COLUMNS) * _PITCH_COLUMNS


def slab_rows(slab: Tensor, rows: slice, columns: int) -> Tensor:
    """These rows of a slab, [R, columns]."""
    width = pitch(columns)
    return slab[rows.start * width : rows.stop * width].view(-1, width)[:, :columns]


def states(hidden: Tensor, at: Tensor | slice, live: Tensor | None) -> Tensor:
    """hidden[at], finite where tokens are not ``live`` [N]."""
    return quiet(hidden[at], None if live is None else live[at])


def gradient_dtype(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    """dtype of logit gradients: 16 bits only where a GEMM takes 16-bit operands and keeps a float32 result."""
    mixed = hidden.dtype == weight.dtype and has_mixed_gemm(hidden.device, hidden.dtype)
    return hidden.dtype if mixed and hidden.dtype.itemsize < dtype.itemsize else dtype


@dataclass
class GradientView:
    """Hidden states of the student whose logits receive gradient.

    Attributes:
        hidden: [N, D].
        d_hidden: their gradient, or None where not required. Overwritten; with ``tokens``, added to.
        dtype: of the gradients of their logits, see ``gradient_dtype``.
        alpha: factor on the gradients of this view, kept out of 16-bit logit gradients.
        live: [N] tokens that take part; states of others may hold anything. None means all.
        tokens: indices of the tokens that the sweep is over; None means all.
    """

    hidden: Tensor
    d_hidden: Tensor | None
    dtype: torch.dtype
    alpha: float = 1.0
    live: Tensor | None = None
    tokens: Tensor | None = None

    def states(self, at: Tensor | slice) -> Tensor:
        """Hidden states of these tokens, [R, D]."""
        return states(self.hidden, at, self.live)

    @property
    def n(self) -> int:
        return len(self.hidden if self.tokens is None else self.tokens)

    @property
    def in_place(self) -> bool:
        """Whether logit gradients overwrite the logits, which have the same dtype."""
        return self.dtype.itemsize >= 4


@dataclass(frozen=True)
class Plan:
    """Sizes of the tiles: tokens and columns of a projection, tokens of a gradient block."""

    rows: int
    columns: int
    gradient_rows: int

    @classmethod
    def fit(
        cls,
        n: int,
        vocab: int,
        slab_bytes: int,
        gradient_bytes: float,
        workspace_bytes: int,
        max_rows: int | None = None,
    ) -> Plan:
        """The tiles within the workspace that cause the least traffic; bytes are those of one token and one column."""
        n = max(n, 1)
        most = n if max_rows is None else min(n, max_rows)
        budget = workspace_bytes // pitch(vocab)
        plans, rows = [], 0
        while rows < most:  # powers of two divide the gradient block and fill the waves of a GEMM
            rows = min(most, 2 * rows or _MIN_ROWS)
            gradient_rows = rows
            if gradient_bytes:
                gradient_rows = min(n, GRADIENT_ROWS, int((budget - rows * slab_bytes) // gradient_bytes))
            if rows * slab_bytes > budget or gradient_rows < rows:
                break
            if rows == n or rows * slab_bytes >= _MIN_TILE_BYTES:
                plans.append(cls(rows, vocab, gradient_rows if gradient_rows == n else gradient_rows // rows * rows))
        if not plans:
            cells = int(workspace_bytes // (slab_bytes + gradient_bytes))
            rows = min(n, max(_MIN_CUT_ROWS, min(_CUT_ROWS, cells // _MIN_COLUMNS)))
            columns = max(cells // rows // _MIN_COLUMNS, 1) * _MIN_COLUMNS
            return cls(rows, min(columns, vocab), rows)
        plan = min(plans, key=lambda plan: _TILE_TRAFFIC / plan.rows + _BLOCK_TRAFFIC / plan.gradient_rows)
        if not _ROW_MULTIPLE < plan.rows < n:
            return plan
        even = math.ceil(n / math.ceil(n / plan.rows))  # no small remainder behind large tiles
        rows = math.ceil(even / _ROW_MULTIPLE) * _ROW_MULTIPLE
        gradient_rows = plan.gradient_rows if plan.gradient_rows == n else plan.gradient_rows // rows * rows
        return cls(rows, vocab, gradient_rows if gradient_bytes else rows)
