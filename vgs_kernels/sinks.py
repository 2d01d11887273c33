"""Where gradient tiles go: into the gradients of given logits, or through the head into hidden states and weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .gemm import add_hidden_gradient, add_weight_gradient
from .plan import GradientView, Plan, gradient_dtype, pitch, slab_rows
from .rows import RowCoefficients, RowTile


class GradientTile(NamedTuple):
    """Where a row backend writes: d_s [R, C], d_a [., C] or None, and the row of d_a of each token (-1: none)."""

    out: Tensor
    out_text: Tensor | None = None
    text_rows: Tensor | None = None


class Sink(Protocol):
    """Takes the gradient of one tile after the other."""

    def tile(self, rows: slice, columns: slice, source: RowTile, coefficients: RowCoefficients) -> GradientTile: ...

    def collect(self, rows: slice, columns: slice) -> None: ...


class DenseSink:
    """Gradients of logits that the caller holds."""

    def __init__(self, d_student: Tensor, d_text: Tensor | None) -> None:
        self._gradients = d_student, d_text

    def tile(self, rows: slice, columns: slice, source: RowTile, coefficients: RowCoefficients) -> GradientTile:
        return GradientTile(*(None if x is None else x[rows, columns] for x in self._gradients))

    def collect(self, rows: slice, columns: slice) -> None:
        pass


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
        self.views, self.weight, self.plan, self.add = views, weight, plan, add
        self.d_weight, self.d_bias = d_weight, d_bias
        self._start = 0
        size = plan.gradient_rows * pitch(plan.columns)
        self._blocks = [
            None if view.in_place else weight.new_empty(size, dtype=gradient_dtype(view.hidden)) for view in views
        ]
        self._gate = weight.new_empty(plan.gradient_rows, dtype=torch.bool)

    def tile(self, rows: slice, columns: slice, source: RowTile, coefficients: RowCoefficients) -> GradientTile:
        local = slice(rows.start - self._start, rows.stop - self._start)
        self._tiles, text_rows = [], None
        for view, block, slab in zip(self.views, self._blocks, (source.student, source.student_text), strict=False):
            if view.in_place:
                self._tiles.append(slab)
            elif view.compact:
                gate = coefficients.language_weight != 0
                self._gate[local] = gate
                row = self._gate[: local.stop].cumsum(0)[local] - 1
                text_rows = torch.where(gate, row, -1)
                self._tiles.append(slab_rows(block, slice(0, self.plan.gradient_rows), slab.shape[1]))
            else:
                self._tiles.append(slab_rows(block, local, slab.shape[1]))
        return GradientTile(*self._tiles, *[None] * (2 - len(self._tiles)), text_rows)

    def collect(self, rows: slice, columns: slice) -> None:
        """Multiply out the gradient block once it is full, or at the last token."""
        filled = rows.stop - self._start
        next_rows = min(self.plan.rows, self.views[0].n - rows.stop)
        if not self.views[0].in_place and next_rows > 0 and filled + next_rows <= self.plan.gradient_rows:
            return
        at = slice(self._start, rows.stop)
        for index, (view, block, tile) in enumerate(zip(self.views, self._blocks, self._tiles, strict=True)):
            tokens = None if view.tokens is None else view.tokens[at]
            if view.compact:
                tokens = self._gate[:filled].nonzero().squeeze(1) + self._start  # on a GPU, the host waits for them
                filled = len(tokens)
            d_logits = tile if view.in_place else slab_rows(block, slice(0, filled), tile.shape[1])
            keep = self.add or self._start > 0 or index > 0
            if tokens is None:
                d_hidden = None if view.d_hidden is None else view.d_hidden[at]
                self._multiply(d_logits, view.hidden[at], d_hidden, view.alpha, columns, keep, columns.start > 0)
                continue
            d_hidden = None if view.d_hidden is None else view.d_hidden[tokens]
            self._multiply(d_logits, view.hidden[tokens], d_hidden, view.alpha, columns, keep, True)
            if d_hidden is not None:
                view.d_hidden[tokens] = d_hidden
        if columns.stop == len(self.weight):
            self._start = rows.stop

    def _multiply(
        self,
        d_logits: Tensor,
        hidden: Tensor,
        d_hidden: Tensor | None,
        alpha: float,
        columns: slice,
        keep_weight: bool,
        keep_hidden: bool,
    ) -> None:
        """Into the gradients of hidden states and of the head's ``columns``: added to what is to be kept."""
        if d_hidden is not None:
            add_hidden_gradient(d_logits, self.weight[columns], d_hidden, alpha, keep=keep_hidden)
        if self.d_weight is not None:
            add_weight_gradient(d_logits, hidden, self.d_weight[columns], alpha, keep=keep_weight)
        if self.d_bias is not None:
            self.d_bias[columns].add_(d_logits.sum(0, dtype=self.d_bias.dtype), alpha=alpha)
