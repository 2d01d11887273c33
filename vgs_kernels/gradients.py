"""Where gradient tiles go: into the gradients of given logits, or through the head into hidden states and weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gemm import add_hidden_gradient, add_weight_gradient
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
    ) -> None:
        self._views, self._weight, self._plan, self._add = views, weight, plan, add
        self._d_weight, self._d_bias = d_weight, d_bias
        self._start = 0
        size = plan.gradient_rows * pitch(plan.columns)
        self._blocks = [None if view.in_place else weight.new_empty(size, dtype=view.dtype) for view in views]

    def tiles(self, rows: slice, columns: slice, source: RowTile) -> list[Tensor]:
        """Where to write d_s [R, C] and, if wanted, d_a of a tile."""
        local = slice(rows.start - self._start, rows.stop - self._start)
        self._written = [
            slab if view.in_place else slab_rows(block, local, slab.shape[1])
            for view, block, slab in zip(self._views, self._blocks, (source.student, source.student_text), strict=False)
        ]
        return self._written

    def collect(self, rows: slice, columns: slice) -> None:
        """Multiply out the gradient block once it is full, or at the last token."""
        filled = rows.stop - self._start
        next_rows = min(self._plan.rows, self._views[0].n - rows.stop)
        if not self._views[0].in_place and next_rows > 0 and filled + next_rows <= self._plan.gradient_rows:
            return
        for index, (view, block, tile) in enumerate(zip(self._views, self._blocks, self._written, strict=True)):
            d_logits = tile if view.in_place else slab_rows(block, slice(0, filled), tile.shape[1])
            self._multiply(view, slice(self._start, rows.stop), d_logits, columns, self._add or index > 0)
        if columns.stop == len(self._weight):
            self._start = rows.stop

    def _multiply(self, view: GradientView, at: slice, d_logits: Tensor, columns: slice, add: bool) -> None:
        """Into the gradients of these tokens' hidden states and of the head's ``columns``."""
        tokens = at if view.tokens is None else view.tokens[at]
        if view.d_hidden is not None:
            d_hidden = view.d_hidden[tokens]
            keep = view.tokens is not None or columns.start > 0
            add_hidden_gradient(d_logits, self._weight[columns], d_hidden, view.alpha, keep=keep)
            if view.tokens is not None:  # an index makes a copy
                view.d_hidden[tokens] = d_hidden
        if self._d_weight is not None:
            out = self._d_weight[columns]
            add_weight_gradient(d_logits, view.states(tokens), out, view.alpha, keep=add or at.start > 0)
        if self._d_bias is not None:
            self._d_bias[columns].add_(d_logits.sum(0, dtype=self._d_bias.dtype), alpha=view.alpha)


Sink = DenseSink | LinearSink
