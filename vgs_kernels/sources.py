"""Where tiles of logit rows come from: projected from hidden states into slabs, or cut out of given logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .gemm import project
from .heads import Head
from .parallel import VocabularyShard
from .plan import MAX_ROWS, GradientView, Plan, pitch, slab_rows, states
from .rows.layout import LogitTransform, RowTile, new_state, quiet, slices
from .workspace import large_empty

#: Elements of a part of a composed row that is formed on its own.
_FORMED_ELEMENTS = 1 << 20
#: Tokens per tile of logits that the caller holds, in the PyTorch backend: a column block stays in the cache.
DENSE_ROWS = 256

Coefficient = float | Tensor


@dataclass
class StackedRows:
    """Logit rows of one head in one or two views, [N, D] each: one GEMM per tile.

    Of tokens that are not ``live`` [N], states may hold anything; ``tokens`` selects some.
    """

    head: Head
    views: Sequence[Tensor]
    live: Tensor | None = None
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
        if self.live is not None:  # of all views at once
            each = hidden.unflatten(0, (len(self.views), len(hidden) // len(self.views)))
            hidden = quiet(each, self.live[at]).flatten(0, 1)
        bias = None if self.head.bias is None else self.head.bias[columns]
        project(hidden, self.head.weight[columns], out, bias=bias)


class Part(NamedTuple):
    """Rows (coefficient, hidden states [N, D]) that one head projects. Several take a head without soft-cap."""

    head: Head
    rows: Sequence[tuple[Coefficient, Tensor]]
    live: Tensor | None = None

    def states(self, index: int, at: slice) -> Tensor:
        """Hidden states of these tokens, [R, D]."""
        return states(self.rows[index][1], at, self.live)

    def factors(self, at: slice, dtype: torch.dtype) -> list[Coefficient]:
        """The coefficients of these tokens: numbers, or [R, 1]."""
        return [c[at].to(dtype).unsqueeze(1) if isinstance(c, Tensor) else c for c, _ in self.rows]

    def combined(self, at: slice, dtype: torch.dtype) -> tuple[float, Tensor]:
        """alpha and hidden states [R, D] whose product with the head is the sum of the rows.

        The sum is rounded to the hidden states' dtype, whose range it keeps to.
        """
        factors = self.factors(at, dtype)
        alpha = max((abs(factor) for factor in factors if not isinstance(factor, Tensor)), default=1.0) or 1.0
        total = sum(factor / alpha * self.states(i, at).to(dtype) for i, factor in enumerate(factors))
        return alpha, total.to(self.rows[0][1].dtype)

    def add_bias(self, at: slice, bias: Tensor, out: Tensor) -> None:
        """Add the rows' coefficients times the head's scaled bias [C], which masks where any of them is not 0."""
        factors = self.factors(at, out.dtype)
        bias = bias.to(out.dtype)
        masked = bias == -torch.inf
        out.add_(sum(factors) * self.head.scale * bias.masked_fill(masked, 0))
        live = sum(abs(factor) for factor in factors)
        out.masked_fill_(masked & (live != 0), -torch.inf)


@dataclass
class ComposedRow:
    """One logit row sum_k c_k * logits_k of several heads and hidden states, accumulated by the GEMMs themselves.

    The soft-caps and scales of the parts are inside the sum; the temperature is left to the row backend.
    """

    parts: Sequence[Part]

    @property
    def views(self) -> Sequence[Tensor]:
        return [self.parts[0].rows[0][1]]

    @property
    def heads(self) -> list[Head]:
        return [part.head for part in self.parts]

    def project(self, rows: slice, columns: slice, out: Tensor) -> None:
        for index, part in enumerate(self.parts):
            head, coefficient = part.head, part.rows[0][0]
            bias = None if head.bias is None else head.bias[columns]
            alone = len(part.rows) == 1
            if head.softcap is not None or (alone and isinstance(coefficient, Tensor)):
                self._add_formed(part, rows, columns, out, keep=index > 0)
                continue
            alpha, hidden = (coefficient, part.states(0, rows)) if alone else part.combined(rows, out.dtype)
            project(hidden, head.weight[columns], out, alpha=alpha * head.scale, keep=index > 0)
            if bias is not None:
                part.add_bias(rows, bias, out)

    @staticmethod
    def _add_formed(part: Part, rows: slice, columns: slice, out: Tensor, *, keep: bool) -> None:
        """Add a row that no GEMM can weigh, for its soft-cap or its tokens' coefficients: a few columns at a time."""
        weight, head = part.head.weight[columns], part.head
        (factor,), hidden = part.factors(rows, out.dtype), part.states(0, rows)
        for few in slices(len(weight), max(_FORMED_ELEMENTS // len(out), 1)):
            logits = out.new_empty(len(out), few.stop - few.start)
            bias = None if head.bias is None else head.bias[columns][few]
            project(hidden, weight[few], logits, bias=bias)
            logits = times(factor, head.transform()(logits))
            out[:, few] = out[:, few] + logits if keep else logits


def times(coefficient: Coefficient, values: Tensor) -> Tensor:
    """coefficient * values where -inf marks a masked column, whatever the coefficient's sign; 0 wins over it."""
    if not isinstance(coefficient, Tensor) and coefficient > 0:
        return coefficient * values
    masked = values == -torch.inf
    if isinstance(coefficient, Tensor) or coefficient == 0:
        masked = masked & (torch.as_tensor(coefficient, device=values.device) != 0)
    finite = values.masked_fill(values == -torch.inf, 0)
    return (coefficient * finite).masked_fill_(masked, -torch.inf)


@dataclass
class Source:
    """Tiles of two or four logit rows.

    Attributes:
        n: tokens.
        four: whether there are text-only rows.
        shard: the vocabulary's columns here.
        plan: sizes of the tiles.
        like: a tensor of the statistics' dtype and device.
        overwritable: whether tiles may be written to.
    """

    n: int
    four: bool
    shard: VocabularyShard
    plan: Plan
    like: Tensor
    overwritable: bool

    def new_state(self, n_tokens: int, *, rests: bool = False) -> Tensor:
        """[K, n_tokens] statistics of no column; ranks that share a vocabulary send none of the ``RESTS``."""
        return new_state(n_tokens, self.four, self.like, rests=rests and self.shard.group is None)

    def load(self, rows: slice, columns: slice) -> RowTile:
        """The tile of these tokens and columns; void once another one is loaded."""
        raise NotImplementedError


class LinearSource(Source):
    """Tiles projected from hidden states into float32 (float64) slabs that are allocated once.

    Args:
        parts: the student's and the target's rows and, of a pair, the row that decides about a support, if another.
        transforms: of the student's and of the target's logits.
        workspace_bytes: bound on the slabs and gradient blocks together.
        shard: the vocabulary's columns here.
        dtype: of the slabs.
        views: whose gradients will be collected.
        copied: how many rows of a tile's tokens the caller may copy beside it at a time.
        rows_beside: for each token of a gradient block, see gated_rows.py.
    """

    def __init__(
        self,
        parts: Sequence[StackedRows | ComposedRow],
        transforms: tuple[LogitTransform, LogitTransform],
        workspace_bytes: int,
        shard: VocabularyShard,
        dtype: torch.dtype,
        views: Sequence[GradientView] = (),
        copied: int = 0,
        rows_beside: float = 0.0,
    ) -> None:
        n, device = parts[0].n, parts[0].views[0].device
        count = sum(len(part.views) for part in parts)
        own = [view.dtype.itemsize for view in views if not view.in_place]
        # Blocks beside a view that lies in the slabs are tied to its tokens.
        held = (count + copied) * dtype.itemsize
        sizes = (held, sum(own) * (1 + rows_beside)) if len(own) == len(views) else (held + sum(own), 0)
        most = MAX_ROWS.get(device.type)
        most = most and most // max(len(part.views) for part in parts)
        plan = Plan.fit(n, shard.largest, *sizes, workspace_bytes, most)
        #: Whether tiles span the vocabulary, on all ranks that share it.
        self.spans = plan.columns >= shard.largest
        #: Whether there is one tile.
        self.holds_all = self.spans and 0 < n <= plan.rows
        # Every rank of a group cuts the tokens alike, for their statistics are merged tile by tile.
        plan = replace(plan, columns=max(1, min(plan.columns, shard.columns)))
        super().__init__(n, count == 4, shard, plan, torch.empty(0, dtype=dtype, device=device), True)
        self._parts, self._transforms = parts, transforms
        self._may_be_masked = any(head.bias is not None for part in parts for head in part.heads)
        self._slabs = [large_empty(self.like, len(part.views) * plan.rows * pitch(plan.columns)) for part in parts]

    def load(self, rows: slice, columns: slice) -> RowTile:
        n_rows, n_columns = rows.stop - rows.start, columns.stop - columns.start
        tiles: list[Tensor] = []
        for part, slab in zip(self._parts, self._slabs, strict=True):
            out = slab_rows(slab, slice(0, len(part.views) * n_rows), n_columns)
            part.project(rows, columns, out)
            tiles += out.chunk(len(part.views))
        s, t, a, w = (tiles[0], tiles[2], tiles[1], tiles[3]) if self.four else (*tiles[:2], None, None)
        deciding = tiles[2] if len(tiles) == 3 else None
        return RowTile(s, t, a, w, *self._transforms, self._may_be_masked, pitch(n_columns), deciding)


class TileSource(Source):
    """One tile that is there already, of a pair of rows over all columns of a shard."""

    def __init__(self, tile: RowTile, shard: VocabularyShard, like: Tensor) -> None:
        n = len(tile.student)
        super().__init__(n, False, shard, Plan(max(n, 1), shard.columns, max(n, 1)), like, True)
        self._tile = tile

    def load(self, rows: slice, columns: slice) -> RowTile:
        return self._tile


class DenseSource(Source):
    """Tiles cut out of logits that the caller holds, in any floating dtype.

    Args:
        rows: a pair or four rows in the order of ``RowTile``, each a list of addends (coefficient, logits [N, V]).
        transform: of all rows.
        vocab: leading columns to use.
        tile_rows: tokens of a tile.
        dtype: of the statistics.
        first_decides: whether the target's first addend decides about a support.
        live: [N] tokens that take part; the logits of others may hold anything. None: all do.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[tuple[Coefficient, Tensor]]],
        transform: LogitTransform,
        vocab: int,
        tile_rows: int,
        dtype: torch.dtype,
        first_decides: bool = False,
        live: Tensor | None = None,
    ) -> None:
        first = rows[0][0][1]
        shard, plan = VocabularyShard(vocab, vocab, vocab), Plan(tile_rows, vocab, tile_rows)
        super().__init__(len(first), len(rows) == 4, shard, plan, first.new_empty(0, dtype=dtype), False)
        self._rows, self._transform, self._first_decides, self._live = rows, transform, first_decides, live

    def load(self, rows: slice, columns: slice) -> RowTile:
        live = None if self._live is None else self._live[rows]
        deciding = quiet(self._rows[1][0][1][rows, columns], live, -torch.inf) if self._first_decides else None
        tiles = [quiet(self._composed(addends, rows, columns), live, -torch.inf) for addends in self._rows]
        plain = live is None and all(len(addends) == 1 and _is_one(addends[0][0]) for addends in self._rows)
        # Columns behind the vocabulary can be read, and their gradient is 0; what was computed here has none to spare.
        readable = columns.stop - columns.start
        if any(x.stride(1) != 1 for x in tiles):
            tiles = [x.contiguous() for x in tiles]
        elif plain:
            readable = min(x.shape[1] for addends in self._rows for _, x in addends) - columns.start
        tiles = [*tiles, *[None] * (4 - len(tiles))]
        return RowTile(*tiles, self._transform, self._transform, True, readable, deciding)

    def _composed(self, addends: Sequence[tuple[Coefficient, Tensor]], rows: slice, columns: slice) -> Tensor:
        total = None
        for coefficient, logits in addends:
            part = logits[rows, columns]
            if not _is_one(coefficient):
                factor = coefficient[rows].unsqueeze(1) if isinstance(coefficient, Tensor) else coefficient
                part = times(factor, part.to(self.like.dtype))
            total = part if total is None else total.to(self.like.dtype) + part
        return total


def _is_one(coefficient: Coefficient) -> bool:
    return not isinstance(coefficient, Tensor) and coefficient == 1.0
