"""The chunk driver of all losses: brings logit rows into memory tile by tile, runs the two sweeps, collects gradients.

A tile holds the rows of a few tokens. If all columns of a few dozen tokens fit into the workspace (see plan.py), each
tile spans the vocabulary and is projected once; else the vocabulary is cut as well and the tiles are projected once for
each sweep, which costs one more projection and keeps the workspace as small as one likes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .divergence import Divergence
from .gradients import Sink
from .rows import Backend
from .rows.layout import RowCoefficients, RowTile, slices
from .sources import Source


def guard(device: torch.device) -> contextlib.ExitStack:
    """Run without autocast and, for kernel launches, on the tensors' own device."""
    stack = contextlib.ExitStack()
    stack.enter_context(torch.autocast(device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    return stack


class Loss:
    """What becomes of the statistics between the sweeps; by itself nothing, but that logits can be looked up.

    Attributes:
        ids: [N] columns of this shard whose logits are wanted, or None.
        picks: of how many rows, the student's or the student's and the target's.
        divergence: whose support restricts the tiles, or None.
    """

    picks = 1
    divergence: Divergence | None = None

    def __init__(self, ids: Tensor | None = None) -> None:
        self.ids = None if ids is None else ids.contiguous()

    def settle(self, rows: slice, state: Tensor, picked: Tensor | None, tiles: Tiles) -> RowCoefficients | None:
        """Values of these tokens, and the scalars of their gradient (None: there is none).

        Args:
            rows: which tokens.
            state: [K, R] their statistics over the whole vocabulary.
            picked: [picks, R] logits at ``ids``, -inf where an id lies outside of the vocabulary; or None.
            tiles: for another sweep.
        """


def sweep(
    source: Source,
    backend: Backend,
    loss: Loss,
    sink: Sink | None = None,
    known: tuple[Tensor, Tensor | None] | None = None,
    then: Callable[[slice, RowTile, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the statistics sweep and, with a sink, the gradient sweep over all tokens of a source.

    Args:
        source: the logit rows.
        backend: who works on tiles.
        loss: what to do between the sweeps.
        sink: takes the gradient of the student's rows.
        known: what an earlier sweep over the same rows returned; it is then not repeated.
        then: what else to do with a tile that spans the vocabulary and its statistics, before the next one. The
            student's rows are overwritten by then.

    Returns:
        The statistics [K, N], and the logits at the loss's ``ids`` [picks, N], both over all shards of the vocabulary.
    """
    ids = loss.ids
    state, picked = known or (source.new_state(source.n, rests=backend.rests), None)
    if known is None and ids is not None:
        picked = state.new_full((loss.picks, source.n), -torch.inf)
    for rows in slices(source.n, source.plan.rows):
        tiles = Tiles(source, rows, loss.divergence)
        found = state[:, rows], None if picked is None else picked[:, rows]
        if known is None:
            for columns, tile in tiles:
                backend.statistics(tile, found[0])
                if ids is not None:
                    backend.pick(tile, ids[rows], columns.start, found[1])
            source.shard.merge(*found)
        scalars = loss.settle(rows, *found, tiles)
        for columns, tile in tiles if sink is not None and scalars is not None else ():
            moves = columns.start and scalars.chosen is not None
            here = scalars._replace(chosen=scalars.chosen - columns.start) if moves else scalars
            out = sink.tiles(rows, columns, tile)
            backend.gradient(tile, found[0], loss.divergence, here, *out)
            sink.collect(rows, columns)
        if then is not None:
            then(rows, tiles.whole, found[0])
    return state, picked


class Tiles:
    """The tiles of a few tokens, with what lies outside of a support masked. One that spans the vocabulary is kept.

    Supports become masks: they are decided by one limit for each token on one of its rows.

    Attributes:
        limit: [R] least logit inside the support, on the row that decides; None for the whole vocabulary.
    """

    def __init__(self, source: Source, rows: slice, divergence: Divergence | None) -> None:
        self._source, self._rows, self._divergence = source, rows, divergence
        self._support = "full" if divergence is None else divergence.support
        self._columns = slices(source.shard.columns, source.plan.columns)
        self._tile: RowTile | None = None
        self.limit = None if self._support == "full" else self._find_limit()

    def __iter__(self) -> Iterator[tuple[slice, RowTile]]:
        for columns in self._columns:
            if self._tile is None or len(self._columns) > 1:
                self._tile = self._masked(self._source.load(self._rows, columns))
            yield columns, self._tile

    @property
    def spans(self) -> bool:
        """Whether there is one, of all columns that this rank holds."""
        return len(self._columns) == 1

    @property
    def whole(self) -> RowTile:
        """The one that spans the vocabulary."""
        ((_, tile),) = self
        return tile

    def _deciding(self, tile: RowTile) -> Tensor:
        if self._support == "student_top_k":
            return tile.student
        return tile.target if tile.deciding is None else tile.deciding

    def _find_limit(self) -> Tensor:
        count = self._divergence.top_k or 1
        best = self._source.new_state(self._rows.stop - self._rows.start)[:0].t()
        for columns in self._columns:
            tile = self._source.load(self._rows, columns)
            logits = self._deciding(tile)
            found = logits.topk(min(count, logits.shape[1]), sorted=False).values
            best = torch.cat([best, found.to(best.dtype)], 1)
            if len(self._columns) > 1:
                best = best.topk(min(count, best.shape[1]), sorted=False).values
        limit = self._source.shard.top(best, count).amin(1)
        if self._support == "plausible":
            limit = limit + self._divergence.temperature * math.log(self._divergence.plausibility)
        self.limit = limit.clamp(min=torch.finfo(limit.dtype).min)  # a masked column is never inside
        if len(self._columns) == 1:
            self._tile = self._masked(tile)
        return self.limit

    def _masked(self, tile: RowTile) -> RowTile:
        if self._support in ("full", "student_top_k"):
            return tile
        outside = self._deciding(tile) < self.limit.unsqueeze(1)
        fill = Tensor.masked_fill_ if self._source.overwritable else Tensor.masked_fill
        student = tile.student
        if self._support == "teacher_top_k":
            student = fill(student, outside, -torch.inf)
        readable = tile.readable if self._source.overwritable else tile.student.shape[1]
        target = fill(tile.target, outside, -torch.inf)
        return tile._replace(student=student, target=target, may_be_masked=True, readable=readable)
