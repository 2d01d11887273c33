"""The chunk driver: brings logit rows into memory tile by tile, runs the two sweeps, collects gradients.

A tile holds the rows of a few tokens. If all columns of a few dozen tokens fit into the workspace (see plan.py), each
tile spans the vocabulary and is projected once; else the vocabulary is cut as well and the tiles are projected twice,
once for each sweep, which costs one more projection and keeps the workspace as small as one likes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from . import rows_torch
from .gemm import UPCAST_COLUMNS, project
from .parallel import VocabularyShard
from .plan import GradientView, Plan, pitch, slab_rows
from .rows import LogitTransform, RowCoefficients, RowTile, accumulation_dtype, new_state, slices
from .sinks import Sink


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
    """Logit rows of one head in one or two views, [N, D] each: one GEMM per tile. ``tokens`` selects some of them."""

    head: Head
    views: Sequence[Tensor]
    tokens: Tensor | None = None

    @property
    def n(self) -> int:
        return len(self.views[0] if self.tokens is None else self.tokens)

    @property
    def heads(self) -> list[Head]:
        return [self.head]

    def project(self, rows: slice, columns: slice, out: Tensor) -> None:
        at = rows if self.tokens is None else self.tokens[rows]
        hidden = self.views[0][at] if len(self.views) == 1 else torch.cat([view[at] for view in self.views])
        bias = None if self.head.bias is None else self.head.bias[columns]
        project(hidden, self.head.weight[columns], out, bias=bias)


@dataclass
class ComposedRow:
    """One logit row sum_k c_k * logits_k of several heads and hidden states, accumulated by the GEMMs themselves.

    The soft-caps and scales of the parts are inside the sum; the temperature is left to the row backend.
    """

    parts: Sequence[tuple[float, Tensor, Head]]

    @property
    def n(self) -> int:
        return len(self.views[0])

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
            for few in slices(len(weight), UPCAST_COLUMNS):
                logits = out.new_empty(len(out), few.stop - few.start)
                project(hidden[rows], weight[few], logits, bias=None if bias is None else bias[few])
                logits = _times(coefficient, transform(logits))
                out[:, few] = logits if index == 0 else out[:, few] + logits


def _times(coefficient: float, values: Tensor) -> Tensor:
    """coefficient * values where -inf marks a masked column, whatever the coefficient's sign."""
    return (coefficient * values).masked_fill_(values == -torch.inf, -torch.inf)


class Source(Protocol):
    """Where tiles come from."""

    n: int
    shard: VocabularyShard
    plan: Plan

    def new_state(self) -> Tensor: ...

    def load(self, rows: slice, columns: slice) -> RowTile: ...


class LinearSource:
    """Tiles projected from hidden states into float32 (float64) slabs that are allocated once."""

    def __init__(
        self,
        parts: Sequence[StackedRows | ComposedRow],
        transforms: tuple[LogitTransform, LogitTransform],
        workspace_bytes: int,
        shard: VocabularyShard,
        views: Sequence[GradientView] = (),
    ) -> None:
        hidden = parts[0].views[0]
        self.n = parts[0].n
        self.parts = parts
        self.transforms = transforms
        heads = [head for part in parts for head in part.heads]
        self.shard = shard
        self.may_be_masked = any(head.bias is not None for head in heads)
        dtype = accumulation_dtype(hidden)
        count = sum(len(part.views) for part in parts)
        plan = Plan.of(self.n, shard.largest, count * dtype.itemsize, views, workspace_bytes, hidden.device)
        # Every rank of a group cuts the tokens alike, for their statistics meet tile by tile.
        self.plan = replace(plan, columns=max(1, min(plan.columns, shard.columns)))
        self._slabs = [
            hidden.new_empty(len(part.views) * self.plan.rows * pitch(self.plan.columns), dtype=dtype) for part in parts
        ]

    def new_state(self) -> Tensor:
        return new_state(self.n, sum(len(part.views) for part in self.parts) == 4, self._slabs[0])

    def load(self, rows: slice, columns: slice) -> RowTile:
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        tiles: list[Tensor] = []
        for part, slab in zip(self.parts, self._slabs, strict=True):
            out = slab_rows(slab, slice(0, len(part.views) * n_rows), n_columns)
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
        self.shard = VocabularyShard(vocab, vocab)
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


def sweep(
    source: Source,
    backend,
    state: Tensor | None = None,
    coefficients: Callable[[slice, Tensor], RowCoefficients] | None = None,
    sink: Sink | None = None,
    target_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the statistics sweep and, with a sink, the gradient sweep over all tokens of a source.

    Args:
        source: the logit rows.
        backend: row backend.
        state: statistics of an earlier sweep over the same rows, which is then not repeated.
        coefficients: (tokens, their statistics) -> scalars of the gradient sweep.
        sink: takes the gradient of the student's rows.
        target_ids: [N] columns whose student logits are wanted.

    Returns:
        The statistics [K, N], and the student's logits at ``target_ids``, [N] (-inf for an id outside the vocabulary),
        both over all shards of the vocabulary.
    """
    columns_of = slices(source.shard.columns, source.plan.columns)
    target_ids = source.shard.local(target_ids)
    known = state is not None
    state = state if known else source.new_state()
    picked = None if target_ids is None else torch.full_like(state[0], -torch.inf)
    for rows in slices(source.n, source.plan.rows):
        tile = None
        for columns in columns_of if not known else ():
            tile = source.load(rows, columns)
            backend.statistics(tile, state[:, rows])
            if target_ids is not None:
                _pick(tile, target_ids[rows], columns, picked[rows])
        if not known:
            source.shard.merge(state[:, rows], None if picked is None else picked[rows])
        if sink is None:
            continue
        scalars = coefficients(rows, state[:, rows])
        for columns in columns_of:
            if tile is None or len(columns_of) > 1:
                tile = source.load(rows, columns)
            backend.gradient(tile, state[:, rows], scalars, *sink.tile(rows, columns, tile, scalars))
            sink.collect(rows, columns)
    return state, picked


def _pick(tile: RowTile, ids: Tensor, columns: slice, out: Tensor) -> None:
    """Copy the student's logits at ``ids`` that lie in these columns to ``out`` [R]."""
    local = ids - columns.start
    inside = (local >= 0) & (ids < columns.stop)
    logits = tile.student.gather(1, local.clamp(0, tile.student.shape[1] - 1).unsqueeze(1)).squeeze(1)
    out.copy_(torch.where(inside, tile.student_transform(logits.to(out.dtype)), out))
