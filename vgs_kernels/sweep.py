"""The chunk driver: brings logit rows into memory tile by tile, runs the two sweeps, collects gradients.

A tile holds the rows of a few tokens. If all columns of a few dozen tokens fit into the workspace (see plan.py), each
tile spans the vocabulary and is projected once; else the vocabulary is cut as well and the tiles are projected twice,
once for each sweep, which costs one more projection and keeps the workspace as small as one likes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import rows_torch
from .gemm import project
from .parallel import VocabularyShard
from .plan import GradientView, Plan, pitch, slab_rows
from .rows import LogitTransform, RowCoefficients, RowTile, accumulation_dtype, new_state, slices
from .sinks import Sink

#: Elements of a part of a composed row that is formed on its own.
_FORMED_ELEMENTS = 1 << 20


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


class Addend(NamedTuple):
    """One row of a target: coefficient (of every token or, [N], of each) * logits of hidden states [N, D]."""

    coefficient: float | Tensor
    hidden: Tensor

    def factor(self, rows: slice, dtype: torch.dtype) -> float | Tensor:
        """The coefficient of these tokens: a number, or [R, 1]."""
        if not isinstance(self.coefficient, Tensor):
            return self.coefficient
        return self.coefficient[rows].to(dtype).unsqueeze(1)


class ComposedPart(NamedTuple):
    """Rows that one head projects. Several are combined before, which takes a head without soft-cap."""

    head: Head
    addends: Sequence[Addend]

    def combined(self, rows: slice, dtype: torch.dtype) -> tuple[float, Tensor]:
        """alpha and hidden states [R, D] whose product with the head is the sum of the rows.

        The sum is rounded to the hidden states' dtype, whose range it keeps to.
        """
        hidden = self.addends[0].hidden
        factors = [addend.factor(rows, dtype) for addend in self.addends]
        alpha = max((abs(factor) for factor in factors if not isinstance(factor, Tensor)), default=1.0) or 1.0
        total = sum(
            factor / alpha * addend.hidden[rows].to(dtype) for factor, addend in zip(factors, self.addends, strict=True)
        )
        return alpha, total.to(hidden.dtype)

    def add_bias(self, rows: slice, bias: Tensor, out: Tensor) -> None:
        """Add the rows' coefficients times the head's scaled bias [C], which masks where any of them is not 0."""
        factors = [addend.factor(rows, out.dtype) for addend in self.addends]
        bias = bias.to(out.dtype)
        masked = bias == -torch.inf
        out.add_(sum(factors) * self.head.transform.scale * bias.masked_fill(masked, 0))
        live = sum(abs(factor) for factor in factors)
        out.masked_fill_(masked & (live != 0), -torch.inf)


@dataclass
class ComposedRow:
    """One logit row sum_k c_k * logits_k of several heads and hidden states, accumulated by the GEMMs themselves.

    The soft-caps and scales of the parts are inside the sum; the temperature is left to the row backend.
    """

    parts: Sequence[ComposedPart]

    @property
    def n(self) -> int:
        return len(self.views[0])

    @property
    def views(self) -> Sequence[Tensor]:
        return [self.parts[0].addends[0].hidden]

    @property
    def heads(self) -> list[Head]:
        return [part.head for part in self.parts]

    def project(self, rows: slice, columns: slice, out: Tensor) -> None:
        for index, part in enumerate(self.parts):
            head, first = part.head, part.addends[0]
            bias = None if head.bias is None else head.bias[columns]
            alone = len(part.addends) == 1
            if head.transform.softcap is not None or (alone and isinstance(first.coefficient, Tensor)):
                self._add_formed(part, rows, columns, out, keep=index > 0)
                continue
            alpha, hidden = (first.coefficient, first.hidden[rows]) if alone else part.combined(rows, out.dtype)
            project(hidden, head.weight[columns], out, alpha=alpha * head.transform.scale, keep=index > 0)
            if bias is not None:
                part.add_bias(rows, bias, out)

    @staticmethod
    def _add_formed(part: ComposedPart, rows: slice, columns: slice, out: Tensor, *, keep: bool) -> None:
        """Add a row that no GEMM can weigh, for its soft-cap or its tokens' coefficients: a few columns at a time."""
        weight, head = part.head.weight[columns], part.head
        (addend,) = part.addends
        transform = head.transform._replace(inv_temperature=1.0)
        for few in slices(len(weight), max(_FORMED_ELEMENTS // len(out), 1)):
            logits = out.new_empty(len(out), few.stop - few.start)
            bias = None if head.bias is None else head.bias[columns][few]
            project(addend.hidden[rows], weight[few], logits, bias=bias)
            logits = times(addend.factor(rows, out.dtype), transform(logits))
            out[:, few] = out[:, few] + logits if keep else logits


def times(coefficient: float | Tensor, values: Tensor) -> Tensor:
    """coefficient * values where -inf marks a masked column, whatever the coefficient's sign; 0 wins over it."""
    if not isinstance(coefficient, Tensor) and coefficient > 0:
        return coefficient * values
    masked = values == -torch.inf
    if isinstance(coefficient, Tensor) or coefficient == 0:
        masked = masked & (torch.as_tensor(coefficient, device=values.device) != 0)
    finite = values.masked_fill(values == -torch.inf, 0)
    return (coefficient * finite).masked_fill_(masked, -torch.inf)


class Source(Protocol):
    """Where tiles come from."""

    n: int
    shard: VocabularyShard
    plan: Plan
    overwritable: bool
    """Whether tiles may be written to."""

    def new_state(self, n_tokens: int) -> Tensor: ...

    def load(self, rows: slice, columns: slice) -> RowTile: ...


class LinearSource:
    """Tiles projected from hidden states into float32 (float64) slabs that are allocated once.

    Parts are the student's and the target's rows and, of a pair, the row that decides about a support, if that is
    another.
    """

    overwritable = True

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

    def new_state(self, n_tokens: int) -> Tensor:
        return new_state(n_tokens, sum(len(part.views) for part in self.parts) == 4, self._slabs[0])

    def load(self, rows: slice, columns: slice) -> RowTile:
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        tiles: list[Tensor] = []
        for part, slab in zip(self.parts, self._slabs, strict=True):
            out = slab_rows(slab, slice(0, len(part.views) * n_rows), n_columns)
            part.project(rows, columns, out)
            tiles += out.split(n_rows)
        s, t, a, w = (tiles[0], tiles[2], tiles[1], tiles[3]) if len(tiles) == 4 else (*tiles[:2], None, None)
        deciding = tiles[2] if len(tiles) == 3 else None
        return RowTile(s, t, a, w, *self.transforms, self.may_be_masked, pitch(n_columns), deciding)


class DenseSource:
    """Tiles cut out of logits that the caller holds, [N, V] each, in any floating dtype."""

    overwritable = False

    def __init__(self, logits: Sequence[Tensor], transform: LogitTransform, vocab: int, tile_rows: int) -> None:
        self.n = len(logits[0])
        self.shard = VocabularyShard(vocab, vocab, vocab)
        self.plan = Plan(tile_rows, vocab, tile_rows)
        self._logits, self._transform = logits, transform

    def new_state(self, n_tokens: int) -> Tensor:
        first = self._logits[0]
        dtype = accumulation_dtype(first)
        return new_state(n_tokens, len(self._logits) == 4, first.new_empty(0, dtype=dtype))

    def load(self, rows: slice, columns: slice) -> RowTile:
        readable = min(x.shape[1] for x in self._logits) - columns.start
        return _dense_tile([x[rows, columns] for x in self._logits], readable, self._transform)


class ComposedSource:
    """A pair of rows of logits that the caller holds: the student's [N, V], and a target composed of others.

    Args:
        logits: the student's.
        addends: (coefficient, a number or [N], logits [N, V]).
        transform: of both rows.
        vocab: leading columns to use.
        tile_rows: tokens of a tile.
        first_decides: whether the first addend's logits decide about a support.
    """

    overwritable = False

    def __init__(
        self,
        logits: Tensor,
        addends: Sequence[tuple[float | Tensor, Tensor]],
        transform: LogitTransform,
        vocab: int,
        tile_rows: int,
        first_decides: bool,
    ) -> None:
        self.n = len(logits)
        self.shard = VocabularyShard(vocab, vocab, vocab)
        self.plan = Plan(tile_rows, vocab, tile_rows)
        self._student, self._addends, self._transform = logits, addends, transform
        self._first_decides = first_decides

    def new_state(self, n_tokens: int) -> Tensor:
        return new_state(n_tokens, False, self._student.new_empty(0, dtype=accumulation_dtype(self._student)))

    def load(self, rows: slice, columns: slice) -> RowTile:
        deciding = self._addends[0][1][rows, columns] if self._first_decides else None
        target = None
        for coefficient, logits in self._addends:
            part = logits[rows, columns]
            if isinstance(coefficient, Tensor) or coefficient != 1.0:
                factor = coefficient[rows].unsqueeze(1) if isinstance(coefficient, Tensor) else coefficient
                part = times(factor, part.to(accumulation_dtype(part)))
            target = part if target is None else target.to(accumulation_dtype(part)) + part
        return _dense_tile([self._student[rows, columns], target], self._readable(columns), self._transform, deciding)

    def _readable(self, columns: slice) -> int:
        """Columns that may be read in the student's row; a target that was computed here has none to spare."""
        alone = len(self._addends) == 1 and not isinstance(self._addends[0][0], Tensor) and self._addends[0][0] == 1.0
        if not alone:
            return columns.stop - columns.start
        return min(self._student.shape[1], self._addends[0][1].shape[1]) - columns.start


def _dense_tile(
    rows: list[Tensor], readable: int, transform: LogitTransform, deciding: Tensor | None = None
) -> RowTile:
    """Rows of logits that a caller holds. Columns behind the vocabulary can be read, and their gradient is 0."""
    if any(x.stride(1) != 1 for x in rows):
        rows, readable = [x.contiguous() for x in rows], rows[0].shape[1]
    rows = [*rows, *[None] * (4 - len(rows))]
    return RowTile(*rows, transform, transform, True, readable, deciding)


def sweep(
    source: Source,
    backend,
    state: Tensor | None = None,
    picked: Tensor | None = None,
    coefficients: Callable[[slice, Tensor, Tensor | None], RowCoefficients] | None = None,
    sink: Sink | None = None,
    target_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the statistics sweep and, with a sink, the gradient sweep over all tokens of a source.

    Args:
        source: the logit rows.
        backend: row backend.
        state, picked: what an earlier sweep over the same rows returned; it is then not repeated.
        coefficients: (tokens, their statistics, the student's logits at their ``target_ids``) -> scalars of the
            gradient sweep. A column that they choose counts from the first one of this shard.
        sink: takes the gradient of the student's rows.
        target_ids: [N] columns whose student logits are wanted.

    Returns:
        The statistics [K, N], and the student's logits at ``target_ids``, [N] (-inf for an id outside the vocabulary),
        both over all shards of the vocabulary.
    """
    columns_of = slices(source.shard.columns, source.plan.columns)
    target_ids = source.shard.local(target_ids)
    known = state is not None
    state = state if known else source.new_state(source.n)
    if not known:
        picked = None if target_ids is None else torch.full_like(state[0], -torch.inf)
    for rows in slices(source.n, source.plan.rows):
        tile = None
        for columns in columns_of if not known else ():
            tile = source.load(rows, columns)
            backend.statistics(tile, state[:, rows])
            if target_ids is not None:
                pick(tile.student, tile.student_transform, target_ids[rows], columns, picked[rows])
        own = None if picked is None else picked[rows]
        if not known:
            source.shard.merge(state[:, rows], None if own is None else own.unsqueeze(0))
        if sink is None:
            continue
        scalars = coefficients(rows, state[:, rows], own)
        for columns in columns_of:
            if tile is None or len(columns_of) > 1:
                tile = source.load(rows, columns)
            here = scalars if scalars.chosen is None else scalars._replace(chosen=scalars.chosen - columns.start)
            backend.gradient(tile, state[:, rows], here, *sink.tile(rows, columns, tile, here))
            sink.collect(rows, columns)
    return state, picked


def pick(logits: Tensor, transform: LogitTransform, ids: Tensor, columns: slice, out: Tensor) -> None:
    """Copy the logits, once transformed, at ``ids`` that lie in these columns to ``out`` [R]."""
    local = ids - columns.start
    inside = (local >= 0) & (ids < columns.stop)
    chosen = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    out.copy_(torch.where(inside, transform(chosen.to(out.dtype)), out))
