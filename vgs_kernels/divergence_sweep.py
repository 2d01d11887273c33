"""One divergence between the student's rows and a target's: supports, values, gradients, tile by tile.

The rows' statistics give both KLs, and the gradient of the reverse one. Where more is asked for (the JSD, clipped
entries, a tail), a second sweep over the tile sums entries of the normalised rows. Supports become masks: they are
decided by one limit for each token on one of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import entries_torch
from .divergence import Divergence
from .entries import SUMS, TAILS, EntryCoefficients, entry
from .policy import PolicyGradient
from .rows import RowCoefficients, RowTile, Statistics, scaled, slices, wide
from .sinks import Sink
from .sweep import Source, pick, row_backend


def _entry_backend(name: str):
    if name == "torch":
        return entries_torch
    from . import entries_triton

    return entries_triton


class _Tiles:
    """The tiles of a few tokens, with what lies outside of a support masked. One that spans the vocabulary is kept."""

    def __init__(self, source: Source, rows: slice, divergence: Divergence) -> None:
        self._source, self._rows, self._divergence = source, rows, divergence
        self._columns = slices(source.shard.columns, source.plan.columns)
        self._tile: RowTile | None = None
        self.limit: Tensor | None = None
        if divergence.support != "full":
            self.limit = self._find_limit()

    def __iter__(self) -> Iterator[tuple[slice, RowTile]]:
        for columns in self._columns:
            if self._tile is None or len(self._columns) > 1:
                self._tile = self._masked(self._source.load(self._rows, columns))
            yield columns, self._tile

    def _deciding(self, tile: RowTile) -> Tensor:
        if self._divergence.support == "student_top_k":
            return tile.student
        return tile.target if tile.deciding is None else tile.deciding

    def _find_limit(self) -> Tensor:
        """[R] least logit inside the support, on the row that decides."""
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
        if self._divergence.support == "plausible":
            limit = limit + self._divergence.temperature * math.log(self._divergence.plausibility)
        limit = limit.clamp(min=torch.finfo(limit.dtype).min)  # a masked column is never inside
        if len(self._columns) == 1:
            self.limit = limit
            self._tile = self._masked(tile)
        return limit

    def _masked(self, tile: RowTile) -> RowTile:
        if self.limit is None or self._divergence.support == "student_top_k":
            return tile
        outside = self._deciding(tile) < self.limit.unsqueeze(1)
        fill = Tensor.masked_fill_ if self._source.overwritable else Tensor.masked_fill
        student = tile.student
        if self._divergence.support == "teacher_top_k":
            student = fill(student, outside, -torch.inf)
        readable = tile.readable if self._source.overwritable else tile.student.shape[1]
        target = fill(tile.target, outside, -torch.inf)
        return tile._replace(student=student, target=target, may_be_masked=True, readable=readable)


@dataclass
class Outcome:
    """[N] each: values and what else one sweep tells of the tokens (None: not asked for)."""

    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None
    policy: Tensor | None


class DivergenceSweep:
    """Values and gradients of one divergence.

    Args:
        divergence: its knobs.
        source: the logit rows, a pair.
        backend: "torch" or "triton".
        weights: [N] of the values' gradients, in ``unit``.
        unit: what all weights of gradients are divided by.
        gain: d logits / d projection of the student.
        policy: the policy term, or None.
        target_ids: [N] or None.
    """

    def __init__(
        self,
        divergence: Divergence,
        source: Source,
        backend: str,
        weights: Tensor,
        unit: Tensor,
        gain: float,
        policy: PolicyGradient | None,
        target_ids: Tensor | None,
    ) -> None:
        self.divergence, self.source = divergence, source
        self._rows, self._entries = row_backend(backend), _entry_backend(backend)
        self._weights, self._unit, self._gain = weights, unit, gain
        self._policy = policy
        self._ids = source.shard.local(target_ids)
        kind = divergence.kind
        self._sampled = kind == "sampled_reverse_kl"
        plain = divergence.clip is None and divergence.support != "student_top_k"
        self._by_pair = self._sampled or (plain and kind == "reverse_kl")
        self._needs_totals = not (self._by_pair or (plain and kind == "forward_kl"))

    def run(self, sink: Sink | None) -> Outcome:
        """Sweep over all tokens; gradients go to the sink, if any."""
        parts = [self._tokens(rows, sink) for rows in slices(self.source.n, self.source.plan.rows)]
        if not parts:
            empty = wide(self.source.new_state(0)[0])
            return Outcome(empty, empty, None if self._ids is None else empty, None if self._policy is None else empty)
        columns = (None if x[0] is None else torch.cat(x) for x in zip(*parts, strict=True))
        return Outcome(*columns)

    def _tokens(self, rows: slice, sink: Sink | None) -> tuple[Tensor | None, ...]:
        tiles = _Tiles(self.source, rows, self.divergence)
        state = self.source.new_state(rows.stop - rows.start)
        picked = None if self._ids is None else torch.full_like(state[: 1 + self._sampled], -torch.inf)
        for columns, tile in tiles:
            self._rows.statistics(tile, state)
            sampled = [(tile.student, tile.student_transform), (tile.target, tile.target_transform)]
            for out, row in zip(() if picked is None else picked, sampled, strict=False):
                pick(*row, self._ids[rows], columns, out)
        self.source.shard.merge(state, picked)
        x = Statistics(state)
        logps = None if picked is None else x.log_probability(picked[0])
        limit = tiles.limit if self.divergence.support == "student_top_k" else None
        value, coefficients = self._settle(x, state, tiles, limit, logps, picked)
        # A student without any mass inside the support, as of distributions that do not meet.
        value = value.masked_fill(x["s_sum"] == 0, torch.inf)
        value, weight = self._clipped(value, rows)
        policy_value, pull = None, None
        if self._sampled:
            pull = scaled(weight, value)
            weight = torch.zeros_like(weight)
        if self._policy is not None:
            policy_value, slope = self._policy.evaluate(logps, rows)
            slope = scaled(self._policy.weights[rows] / self._unit * self._gain, slope)
            pull = slope if pull is None else pull + slope
        if sink is not None:
            self._gradient(tiles, rows, state, sink, weight, coefficients, limit, pull)
        return value * self.divergence.scale, x.entropy, logps, policy_value

    def _settle(
        self,
        x: Statistics,
        state: Tensor,
        tiles: _Tiles,
        limit: Tensor | None,
        logps: Tensor | None,
        picked: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Values [R] before clipping, and what the gradient is centred at: the mean gap or slope, the tail's slope."""
        if self._sampled:
            return logps - x.log_probability(picked[1], "t"), [torch.zeros_like(logps), None]
        if self._by_pair:
            return x.standard, [x.mean("s_gap"), None]
        if not self._needs_totals:
            return x.forward, [-torch.ones_like(x["s_sum"]), None]
        totals = state.new_zeros(len(SUMS) + len(TAILS), state.shape[1])
        sums, tails = totals[: len(SUMS)], totals[len(SUMS) :].fill_(-torch.inf)
        for _, tile in tiles:
            self._entries.totals(tile, state, self.divergence, limit, sums, tails)
        self.source.shard.sum(sums)
        value, slope = wide(sums)
        if limit is None:
            return value, [slope, None]
        self.source.shard.sum_exponentials(tails)
        log_p, log_q = (tail - x[f"{name}_sum"].log() for tail, name in zip(wide(tails), "st", strict=True))
        p, q = log_p.exp(), log_q.exp()
        tail_value, tail_slope = entry(p, q, log_p - log_q, self.divergence)
        # Where the whole tail of the student underflows in the tile, nothing takes the gradient, however steep it is.
        steepest = torch.finfo(state.dtype).max
        tail_slope_of_one = torch.where(p > 0, tail_slope / p, 0).clamp(-steepest, steepest)
        return value + tail_value, [slope + tail_slope, tail_slope_of_one]

    def _clipped(self, value: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Values after the clip of a token, and the weights of their gradients."""
        weight = self._weights[rows] * (self._gain * self.divergence.scale)
        limit = self.divergence.token_clip
        if limit is None:
            return value, weight
        if self._sampled:
            return value.clamp(-limit, limit), weight
        return value.clamp(max=limit), torch.where(value > limit, 0, weight)

    def _gradient(
        self,
        tiles: _Tiles,
        rows: slice,
        state: Tensor,
        sink: Sink,
        weight: Tensor,
        centres: list[Tensor | None],
        limit: Tensor | None,
        pull: Tensor | None,
    ) -> None:
        weight, mean, tail, pull = (None if v is None else v.to(state.dtype) for v in (weight, *centres, pull))
        limit = None if limit is None else limit.to(state.dtype)
        for columns, tile in tiles:
            chosen = None if pull is None else self._ids[rows] - columns.start
            scalars = RowCoefficients(weight, mean, torch.zeros_like(mean), policy=pull, chosen=chosen)
            out = sink.tile(rows, columns, tile, scalars).out
            if self._by_pair:
                self._rows.gradient(tile, state, scalars, out)
            else:
                scalars = EntryCoefficients(weight, mean, tail, limit, pull, chosen)
                self._entries.gradient(tile, state, self.divergence, scalars, out)
            sink.collect(rows, columns)
