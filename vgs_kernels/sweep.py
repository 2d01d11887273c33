"""The chunk driver: brings logit rows into memory tile by tile, runs the two sweeps, collects gradients.

A tile holds the rows of a few tokens. If all columns of at least ``_MIN_ROWS`` tokens fit into the workspace, each
tile spans the vocabulary and is projected once; else the vocabulary is cut as well and the tiles are projected twice,
once for each sweep, which costs one more projection and keeps the workspace as small as one likes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from . import rows_torch
from .gemm import UPCAST_COLUMNS, add_hidden_gradient, add_weight_gradient, has_mixed_gemm, project
from .rows import LogitTransform, RowCoefficients, RowTile, accumulation_dtype, new_state

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


def _rows(slab: Tensor, rows: slice, columns: int) -> Tensor:
    """These rows of a slab, [R, columns]."""
    width = pitch(columns)
    return slab[rows.start * width : rows.stop * width].view(-1, width)[:, :columns]


def row_backend(name: str):
    """The module with ``statistics`` and ``gradient`` that a resolved backend name stands for."""
    if name == "torch":
        return rows_torch
    from . import rows_triton

    return rows_triton


def guard(device: torch.device) -> contextlib.ExitStack:
    """Run without autocast and, for kernel launches, on the tensors' own device."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    return stack


@dataclass
class Head:
    """A language-model head: logits = transform(hidden @ weight^T + bias); weight [V, D], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform


@dataclass
class StackedRows:
    """Logit rows of one head in one or two views, [N, D] each: one GEMM per tile."""

    head: Head
    views: Sequence[Tensor]

    @property
    def heads(self) -> list[Head]:
        return [self.head]

    def project(self, rows: slice, columns: slice, out: Tensor) -> None:
        hidden = self.views[0][rows] if len(self.views) == 1 else torch.cat([view[rows] for view in self.views])
        bias = None if self.head.bias is None else self.head.bias[columns]
        project(hidden, self.head.weight[columns], out, bias=bias)


@dataclass
class ComposedRow:
    """One logit row sum_k c_k * logits_k of several heads and hidden states, accumulated by the GEMMs themselves.

    The soft-caps and scales of the parts are inside the sum; the temperature is left to the row backend.
    """

    parts: Sequence[tuple[float, Tensor, Head]]

    @property
    def views(self) -> Sequence[Tensor]:
        return [self.parts[0][1]]

    @property
    def heads(self) -> list[Head]:
        return [head for _, _, head in self.parts]

    def project(self, rows: slice, columns: slice, out: Tensor) -> None:
        for index, (coefficient, hidden, head) in enumerate(self.parts):
            weight, transform = head.weight[columns], head.transform
            bias = None if head.bias is None else head.bias[columns]
            if transform.softcap is None:
                alpha = coefficient * transform.scale
                project(hidden[rows], weight, out, alpha=alpha, keep=index > 0)
                if bias is not None:
                    out.add_(_times(alpha, bias.to(out.dtype)))
                continue
            # A soft-cap is not linear: this part is formed on its own, a few columns at a time.
            transform = transform._replace(inv_temperature=1.0)
            for few in _slices(len(weight), UPCAST_COLUMNS):
                logits = out.new_empty(len(out), few.stop - few.start)
                project(hidden[rows], weight[few], logits, bias=None if bias is None else bias[few])
                logits = _times(coefficient, transform(logits))
                out[:, few] = logits if index == 0 else out[:, few] + logits


def _times(coefficient: float, values: Tensor) -> Tensor:
    """coefficient * values where -inf marks a masked column, whatever the coefficient's sign."""
    return (coefficient * values).masked_fill_(values == -torch.inf, -torch.inf)


@dataclass(frozen=True)
class Plan:
    """Sizes of the tiles: tokens and columns of a projection, tokens of a gradient block."""

    rows: int
    columns: int
    gradient_rows: int

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


class Source(Protocol):
    """Where tiles come from."""

    n: int
    vocab: int
    plan: Plan

    def new_state(self) -> Tensor: ...

    def load(self, rows: slice, columns: slice) -> RowTile: ...


class Sink(Protocol):
    """Where gradient tiles go."""

    def tile(self, rows: slice, columns: slice, source: RowTile) -> tuple[Tensor, Tensor | None]: ...

    def collect(self, rows: slice, columns: slice) -> None: ...


class LinearSource:
    """Tiles projected from hidden states into float32 (float64) slabs that are allocated once."""

    def __init__(
        self,
        parts: Sequence[StackedRows | ComposedRow],
        transforms: tuple[LogitTransform, LogitTransform],
        workspace_bytes: int,
        gradient_bytes: int = 0,
    ) -> None:
        hidden = parts[0].views[0]
        self.n = len(hidden)
        self.parts = parts
        self.transforms = transforms
        heads = [head for part in parts for head in part.heads]
        self.vocab = len(heads[0].weight)
        self.may_be_masked = any(head.bias is not None for head in heads)
        dtype = accumulation_dtype(hidden)
        count = sum(len(part.views) for part in parts)
        self.plan = Plan.fit(self.n, self.vocab, count * dtype.itemsize, gradient_bytes, workspace_bytes)
        self._slabs = [
            hidden.new_empty(len(part.views) * self.plan.rows * pitch(self.plan.columns), dtype=dtype) for part in parts
        ]

    def new_state(self) -> Tensor:
        return new_state(self.n, sum(len(part.views) for part in self.parts) == 4, self._slabs[0])

    def load(self, rows: slice, columns: slice) -> RowTile:
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        tiles: list[Tensor] = []
        for part, slab in zip(self.parts, self._slabs, strict=True):
            out = _rows(slab, slice(0, len(part.views) * n_rows), n_columns)
            part.project(rows, columns, out)
            tiles += out.split(n_rows)
        s, t, a, w = (tiles[0], tiles[2], tiles[1], tiles[3]) if len(tiles) == 4 else (*tiles, None, None)
        return RowTile(s, t, a, w, *self.transforms, self.may_be_masked, pitch(n_columns))


class DenseSource:
    """Tiles cut out of logits that the caller holds, [N, V] each, in any floating dtype."""

    def __init__(
        self, logits: Sequence[Tensor], transforms: tuple[LogitTransform, LogitTransform], vocab: int, tile_rows: int
    ) -> None:
        self.n = len(logits[0])
        self.vocab = vocab
        self.plan = Plan(tile_rows, vocab, tile_rows)
        self._logits, self._transforms = logits, transforms

    def new_state(self) -> Tensor:
        first = self._logits[0]
        dtype = accumulation_dtype(first)
        return new_state(self.n, len(self._logits) == 4, first.new_empty(0, dtype=dtype))

    def load(self, rows: slice, columns: slice) -> RowTile:
        # The caller's columns behind the vocabulary can be read, and their gradient is 0.
        readable = min(x.shape[1] for x in self._logits) - columns.start
        tiles = [x[rows, columns] for x in self._logits]
        if any(x.stride(1) != 1 for x in tiles):
            tiles, readable = [x.contiguous() for x in tiles], columns.stop - columns.start
        return RowTile(*tiles, *[None] * (4 - len(tiles)), *self._transforms, may_be_masked=True, readable=readable)


class DenseSink:
    """Gradients of logits that the caller holds."""

    def __init__(self, d_student: Tensor, d_text: Tensor | None) -> None:
        self._gradients = d_student, d_text

    def tile(self, rows: slice, columns: slice, source: RowTile) -> tuple[Tensor, Tensor | None]:
        return tuple(None if x is None else x[rows, columns] for x in self._gradients)

    def collect(self, rows: slice, columns: slice) -> None:
        pass


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """dtype of logit gradients: 16 bits only where a GEMM takes 16-bit operands and keeps a float32 result."""
    if has_mixed_gemm(hidden.device, hidden.dtype) or hidden.dtype == torch.float64:
        return hidden.dtype
    return torch.float32


class LinearSink:
    """Collects logit gradients into gradients of hidden states [N, D] and of one head, in float32 (float64).

    Args:
        views: the student's hidden states whose logits receive gradient: [multimodal] or [multimodal, text-only].
        d_views: their gradients, or None where not required; overwritten, as long as there is a token.
        head: the student's head.
        d_weight, d_bias: its gradients, or None where not required.
        plan: of the source.
        alpha: factor on all gradients, kept out of 16-bit logit gradients.
        add: add to ``d_weight``; else the first block of tokens overwrites it. ``d_bias`` is always added to.
    """

    def __init__(
        self,
        views: Sequence[Tensor],
        d_views: Sequence[Tensor | None],
        head: Head,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        plan: Plan,
        *,
        alpha: float = 1.0,
        add: bool = False,
    ) -> None:
        self.views, self.d_views, self.head = views, d_views, head
        self.d_weight, self.d_bias = d_weight, d_bias
        self.plan, self.alpha, self.add = plan, alpha, add
        self._start = 0
        self._blocks: list[Tensor] | None = None
        if shares_slab(views[0]):
            return  # the gradient overwrites the logits
        size = plan.gradient_rows * pitch(plan.columns)
        self._blocks = [views[0].new_empty(size, dtype=gradient_dtype(views[0])) for _ in views]

    def tile(self, rows: slice, columns: slice, source: RowTile) -> tuple[Tensor, Tensor | None]:
        if self._blocks is None:
            self._tiles = [source.student, source.student_text][: len(self.views)]
        else:
            local = slice(rows.start - self._start, rows.stop - self._start)
            self._tiles = [_rows(block, local, columns.stop - columns.start) for block in self._blocks]
        return self._tiles[0], self._tiles[1] if len(self.views) == 2 else None

    def collect(self, rows: slice, columns: slice) -> None:
        """Multiply out the gradient block once it is full, or at the last token."""
        filled = rows.stop - self._start
        next_rows = min(self.plan.rows, len(self.views[0]) - rows.stop)
        if self._blocks is not None and next_rows > 0 and filled + next_rows <= self.plan.gradient_rows:
            return
        block = slice(self._start, rows.stop)
        for index, (hidden, d_hidden) in enumerate(zip(self.views, self.d_views, strict=True)):
            if self._blocks is None:
                d_logits = self._tiles[index]
            else:
                d_logits = _rows(self._blocks[index], slice(0, filled), columns.stop - columns.start)
            if d_hidden is not None:
                keep = columns.start > 0
                add_hidden_gradient(d_logits, self.head.weight[columns], d_hidden[block], self.alpha, keep=keep)
            if self.d_weight is not None:
                keep = self.add or self._start > 0 or index > 0
                add_weight_gradient(d_logits, hidden[block], self.d_weight[columns], self.alpha, keep=keep)
            if self.d_bias is not None:
                self.d_bias[columns].add_(d_logits.sum(0, dtype=self.d_bias.dtype), alpha=self.alpha)
        if columns.stop == len(self.head.weight):
            self._start = rows.stop


def shares_slab(hidden: Tensor) -> bool:
    """Whether logit gradients have the slabs' dtype, so that they can overwrite the logits."""
    return gradient_dtype(hidden).itemsize >= 4


def gradient_bytes(hidden: Tensor, n_views: int) -> int:
    """Bytes of the gradient block per token and column."""
    return 0 if shares_slab(hidden) else n_views * gradient_dtype(hidden).itemsize


def _slices(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def sweep(
    source: Source,
    backend,
    state: Tensor | None = None,
    coefficients: Callable[[slice, Tensor], RowCoefficients] | None = None,
    sink: Sink | None = None,
    target_ids: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Run the statistics sweep and, with a sink, the gradient sweep over all tokens of a source.

    Args:
        source: the logit rows.
        backend: row backend.
        state: statistics of an earlier sweep over the same rows, which is then not repeated.
        coefficients: (tokens, their statistics) -> scalars of the gradient sweep.
        sink: takes the gradient of the student's rows.
        target_ids: [N] columns whose student logits are wanted.
        add: add to the gradients that the sink's tiles hold.

    Returns:
        The statistics [K, N], and the student's logits at ``target_ids``, [N] (-inf for an id outside the vocabulary).
    """
    columns_of = _slices(source.vocab, source.plan.columns)
    known = state is not None
    state = state if known else source.new_state()
    picked = None if target_ids is None else torch.full_like(state[0], -torch.inf)
    for rows in _slices(source.n, source.plan.rows):
        tile = None
        for columns in columns_of if not known else ():
            tile = source.load(rows, columns)
            backend.statistics(tile, state[:, rows])
            if target_ids is not None:
                _pick(tile, target_ids[rows], columns, picked[rows])
        if sink is None:
            continue
        scalars = coefficients(rows, state[:, rows])
        for columns in columns_of:
            if tile is None or len(columns_of) > 1:
                tile = source.load(rows, columns)
            out, out_text = sink.tile(rows, columns, tile)
            backend.gradient(tile, state[:, rows], scalars, out, out_text, add)
            sink.collect(rows, columns)
    return state, picked


def _pick(tile: RowTile, ids: Tensor, columns: slice, out: Tensor) -> None:
    """Copy the student's logits at ``ids`` that lie in these columns to ``out`` [R]."""
    local = ids - columns.start
    inside = (local >= 0) & (ids < columns.stop)
    logits = tile.student.gather(1, local.clamp(0, tile.student.shape[1] - 1).unsqueeze(1)).squeeze(1)
    out.copy_(torch.where(inside, tile.student_transform(logits.to(out.dtype)), out))
