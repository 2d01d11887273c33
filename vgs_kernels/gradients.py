"""Where gradient tiles go: into the gradients of given logits, or through the head into hidden states and weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .active_columns import LeftOut, active_columns
from .gated_rows import GatedRows
from .gemm import UPCAST_COLUMNS, add_hidden_gradient, add_weight_gradient
from .plan import GradientView, Plan, pitch, slab_rows
from .rows.layout import RowTile


class DenseSink:
    """Gradients [N, V] of logits that the caller holds: the student's and, if wanted, the text-only ones.

    With ``add``, tiles are added to what is there.
    """

    def __init__(self, gradients: Sequence[Tensor], *, add: bool = False) -> None:
        self._gradients, self._add = gradients, add

    def tiles(self, rows: slice, columns: slice, source: RowTile) -> list[Tensor]:
        """Where to write d_s [R, C] and, if wanted, d_a of a tile."""
        # As wide as the gradients: columns behind the tile that can be read are written, too.
        wide = [torch.empty_like(x[rows]) if self._add else x[rows] for x in self._gradients]
        self._written = [x[:, columns] for x in wide]
        return self._written

    def collect(self, rows: slice, columns: slice) -> None:
        """Take what was written there."""
        if self._add:
            for gradient, tile in zip(self._gradients, self._written, strict=True):
                gradient[rows, columns] += tile


class LinearSink:
    """Collects logit gradients into gradients of hidden states and of one head, in float32 (float64).

    Args:
        views: multimodal, or multimodal and text-only.
        weight: the student's, [V, D].
        d_weight, d_bias: gradients of the head, or None where not required.
        plan: of the source.
        add: add to ``d_weight``; else the first block of tokens overwrites it. ``d_bias`` is always added to.
        left_out: bounds and takes what is left out of the products, see active_columns.py; None: nothing is.
        gated: whose rows are multiplied out with those of the one view; its tiles span the vocabulary. The last block
            then waits for ``close``.

    Attributes:
        nbytes: of the gradient blocks.
    """

    def __init__(
        self,
        views: Sequence[GradientView],
        weight: Tensor,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
        plan: Plan,
        *,
        add: bool = False,
        left_out: LeftOut | None = None,
        gated: GatedRows | None = None,
    ) -> None:
        self._views, self._weight, self._plan, self._add = views, weight, plan, add
        self._left_out, self._gated, self._late = left_out, gated, None
        self._d_weight, self._d_bias = d_weight, d_bias
        self._start = 0
        self._capacity = plan.gradient_rows + (0 if gated is None else gated.rows_beside())
        size = self._capacity * pitch(plan.columns)
        self._blocks = [None if view.in_place else weight.new_empty(size, dtype=view.dtype) for view in views]
        self.nbytes = sum(block.nbytes for block in self._blocks if block is not None)

    def tiles(self, rows: slice, columns: slice, source: RowTile) -> list[Tensor]:
        """Where to write d_s [R, C] and, if wanted, d_a of a tile; or, of tokens with a slot, d_a [S, C] of a block."""
        local = slice(rows.start - self._start, rows.stop - self._start)
        self._written = [
            slab if view.in_place else slab_rows(block, local, slab.shape[1])
            for view, block, slab in zip(self._views, self._blocks, (source.student, source.student_text), strict=False)
        ]
        if self._gated is None:
            return self._written
        tokens = min(self._plan.gradient_rows, self._views[0].n - self._start)
        place = slice(tokens, tokens + self._gated.slots(tokens))
        slots = slab_rows(self._blocks[0], place, source.student.shape[1])
        return [*self._written, slots.zero_() if rows.start == self._start else slots]

    def collect(self, rows: slice, columns: slice) -> None:
        """Multiply out the gradient block once it is full or, unless gated rows may follow, at the last token."""
        filled = rows.stop - self._start
        next_rows = min(self._plan.rows, self._views[0].n - rows.stop)
        if not self._views[0].in_place and next_rows > 0 and filled + next_rows <= self._plan.gradient_rows:
            return
        if self._gated is not None and next_rows <= 0:
            return  # ``close`` does
        self._multiply_out(rows.stop, columns, filled + (0 if self._gated is None else len(self._gated.close())))
        if columns.stop == len(self._weight):
            self._start = rows.stop

    def append(self, tokens: Tensor) -> Tensor | None:
        """Take more gated tokens [R] into the last block, behind its slots; returns where their language gradients
        [R, V] are to be written, or None without room for them."""
        n_rows = self._views[0].n - self._start
        n_rows += self._gated.slots(n_rows)
        if n_rows + len(tokens) > self._capacity:
            return None
        self._late = tokens
        return slab_rows(self._blocks[0], slice(n_rows, n_rows + len(tokens)), len(self._weight))

    def close(self) -> None:
        """Multiply out the last block, where gated rows could follow."""
        n = self._views[0].n
        self._multiply_out(n, slice(0, len(self._weight)), n - self._start + len(self._gated.close(self._late)))

    def _multiply_out(self, stop: int, columns: slice, n_rows: int) -> None:
        """The blocks' first ``n_rows``, of tokens up to ``stop`` and of gated ones."""
        for index, (view, block, tile) in enumerate(zip(self._views, self._blocks, self._written, strict=True)):
            d_logits = tile if view.in_place else slab_rows(block, slice(0, n_rows), tile.shape[1])
            self._multiply(view, slice(self._start, stop), d_logits, columns, self._add or index > 0)

    def _multiply(self, view: GradientView, at: slice, d_logits: Tensor, columns: slice, add: bool) -> None:
        """Into the gradients of the hidden states of these tokens, and of those with a slot, and of the head's
        ``columns``."""
        tokens, gated = at if view.tokens is None else view.tokens[at], self._gated
        if self._d_bias is not None:
            self._d_bias[columns].add_(d_logits.sum(0, dtype=self._d_bias.dtype), alpha=view.alpha)
        d_hidden = None if view.d_hidden is None else view.d_hidden[tokens]
        out, keep, d_weight, hidden = d_hidden, view.tokens is not None or columns.start > 0, None, None
        if gated is not None and any(x.d_hidden is not None for x in (view, gated.view)):
            out, keep = gated.view.hidden.new_empty(len(d_logits), self._weight.shape[1], dtype=gated.dtype), False
        if self._d_weight is not None:
            d_weight, hidden = self._d_weight[columns], view.states(tokens)
            hidden = hidden if gated is None else torch.cat([hidden, gated.states()])
        products = _Products(self._weight[columns], hidden, out, d_weight, view.alpha, keep, add or at.start > 0)
        if self._left_out is None or (out is None and d_weight is None):
            products.add(d_logits)
        else:
            self._multiply_active(products, tokens, d_logits, self._left_out)
        if gated is not None and out is not None:
            count = at.stop - at.start
            gated.add(out[count:])
            if d_hidden is not None:
                d_hidden.copy_(out[:count])
        elif d_hidden is not None and view.tokens is not None:  # an index makes a copy
            view.d_hidden[tokens] = d_hidden

    def _multiply_active(
        self, products: _Products, tokens: Tensor | slice, d_logits: Tensor, left_out: LeftOut
    ) -> None:
        """The columns that matter alone."""
        row_sums, count = left_out.passes.row_sums, d_logits.shape[1]
        sums = row_sums(d_logits)
        active = active_columns(d_logits, sums[0], left_out.tolerance, left_out.passes)
        if active is None:
            products.add(d_logits)
            kept, counts = sums, (count, count)
        else:
            kept, counts = products.add_columns(d_logits, active, row_sums), (len(active), count)
        if self._gated is not None:
            own = tokens.stop - tokens.start
            left_out.add(self._gated.tokens, products.alpha, sums[:, own:], kept[:, own:], counts, self._gated.held)
            sums, kept = sums[:, :own], kept[:, :own]
        left_out.add(tokens, products.alpha, sums, kept, counts)


class _Products(NamedTuple):
    """The products of logit gradients d_logits [R, C] with a head and with hidden states.

    d_hidden [R, D] = keep_hidden * d_hidden + alpha * d_logits @ weight [C, D], and
    d_weight [C, D] = keep_weight * d_weight + alpha * d_logits^T @ hidden [R, D]; None where not wanted.
    """

    weight: Tensor
    hidden: Tensor | None
    d_hidden: Tensor | None
    d_weight: Tensor | None
    alpha: float
    keep_hidden: bool
    keep_weight: bool

    def add(self, d_logits: Tensor) -> None:
        if self.d_hidden is not None:
            add_hidden_gradient(d_logits, self.weight, self.d_hidden, self.alpha, keep=self.keep_hidden)
        if self.d_weight is not None:
            add_weight_gradient(d_logits, self.hidden, self.d_weight, self.alpha, keep=self.keep_weight)

    def add_columns(self, d_logits: Tensor, active: Tensor, row_sums: Callable[[Tensor], Tensor]) -> Tensor:
        """Of these columns alone, a few at a time; returns their ``row_sums``."""
        for out, keep in ((self.d_hidden, self.keep_hidden), (self.d_weight, self.keep_weight)):
            if out is not None and not keep:
                out.zero_()
        sums = row_sums(d_logits[:, :0])
        for few in active.split(UPCAST_COLUMNS):
            part, weight, d_weight = d_logits.index_select(1, few), self.weight, self.d_weight
            if self.d_hidden is not None:
                weight = weight.index_select(0, few)
            if d_weight is not None:
                d_weight = d_weight.index_select(0, few)
            self._replace(weight=weight, d_weight=d_weight, keep_hidden=True, keep_weight=True).add(part)
            if d_weight is not None:
                self.d_weight.index_copy_(0, few, d_weight)
            sums += row_sums(part)
        return sums


Sink = DenseSink | LinearSink
