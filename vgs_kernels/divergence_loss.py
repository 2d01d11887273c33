"""One divergence between the student's rows and a composed target: supports, values, gradients, tile by tile.

The rows' statistics give both KLs, and the gradient of the reverse one. Where more is asked for (the JSD, clipped
entries, a tail), a second sweep over the tile sums entries of the normalised rows.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from .arguments import Call, StudentGradients
from .divergence import Divergence
from .driver import Tiles, sweep
from .gradients import DenseSink
from .policy import unit_weights
from .rows.entries_torch import SUMS, TAILS, entry
from .rows.layout import EntryCoefficients, LogitTransform, RowCoefficients, Statistics, scaled, wide
from .sources import DENSE_ROWS, ComposedRow, DenseSource, LinearSource, Part, StackedRows

#: Terms of the loss in the order of the operator's rows; ``target_logps`` and ``policy`` follow if asked for.
TERMS = ("divergence", "entropy")

Outcome = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


class DivergenceLoss:
    """Values and scalars of the gradient of one divergence and of a policy term. A ``driver.Loss``.

    Args:
        call: the arguments.
        gain: d logits / d projection of the student.
        total: entries of the vocabulary.
        ids: columns of this shard, or None.
        shard: adds up what its ranks have of a sum over the vocabulary; of given logits None.
    """

    def __init__(self, call: Call, gain: float, total: int, ids: Tensor | None, shard) -> None:
        self.divergence = divergence_of(call)
        if self.divergence.top_k is not None and self.divergence.top_k > total:
            raise ValueError(f"top_k must be at most the vocabulary's {total} entries, got {self.divergence.top_k}.")
        self.policy, self.ids, self._shard, self._gain, self.dtype = call.policy, ids, shard, gain, call.dtype
        self._totals = call.backend.totals
        self.token_weights = call["token_weights"]
        self.unit_weights, self.unit = unit_weights(self.token_weights, call.dtype, policy=self.policy)
        self._sampled = self.divergence.kind == "sampled_reverse_kl"
        self.picks = 2 if self._sampled else 1
        plain = self.divergence.clip is None and self.divergence.support != "student_top_k"
        self._by_pair = self._sampled or (plain and self.divergence.kind == "reverse_kl")
        self._by_statistics = self._by_pair or (plain and self.divergence.kind == "forward_kl")
        self._found: list[list[Tensor]] = []

    def settle(
        self, rows: slice, state: Tensor, picked: Tensor | None, tiles: Tiles
    ) -> RowCoefficients | EntryCoefficients:
        x = Statistics(state)
        logps = None if picked is None else x.log_probability(picked[0])
        limit = tiles.limit if self.divergence.support == "student_top_k" else None
        value, mean, tail = self._value(x, state, tiles, limit, logps, picked)
        # A student without any mass inside the support, as of distributions that do not meet.
        value = value.masked_fill(x["s_sum"] == 0, torch.inf)
        value, weight = self._clipped(value, rows)
        found, pull = [value * self.divergence.scale, x.entropy, *([] if logps is None else [logps])], None
        if self._sampled:
            pull = scaled(weight, value)
            weight = torch.zeros_like(weight)
        if self.policy is not None:
            policy_value, slope = self.policy.evaluate(logps, rows)
            slope = scaled(self.policy.weights[rows] / self.unit * self._gain, slope)
            pull = slope if pull is None else pull + slope
            found.append(policy_value)
        self._found.append(found)
        weight, mean, tail, limit, pull = (
            None if v is None else v.to(state.dtype) for v in (weight, mean, tail, limit, pull)
        )
        chosen = None if pull is None else self.ids[rows]
        if self._by_pair:
            return RowCoefficients(weight, mean, torch.zeros_like(mean), policy=pull, chosen=chosen)
        return EntryCoefficients(weight, mean, tail, limit, pull, chosen)

    def _value(
        self,
        x: Statistics,
        state: Tensor,
        tiles: Tiles,
        limit: Tensor | None,
        logps: Tensor | None,
        picked: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [R] before clipping, and what the gradient is centred at: the mean gap or slope, the tail's slope."""
        if self._sampled:
            return logps - x.log_probability(picked[1], "t"), torch.zeros_like(logps), None
        if self._by_pair:
            return x.standard, x.mean("s_gap"), None
        if self._by_statistics:
            return x.forward, -torch.ones_like(x["s_sum"]), None
        totals = state.new_zeros(len(SUMS) + len(TAILS), state.shape[1])
        sums, tails = totals[: len(SUMS)], totals[len(SUMS) :].fill_(-torch.inf)
        for _, tile in tiles:
            self._totals(tile, state, self.divergence, limit, sums, tails)
        self._shard.sum(sums)
        value, slope = wide(sums)
        if limit is None:
            return value, slope, None
        self._shard.sum_exponentials(tails)
        log_p, log_q = (tail - x[f"{name}_sum"].log() for tail, name in zip(wide(tails), "st", strict=True))
        p, q = log_p.exp(), log_q.exp()
        tail_value, tail_slope = entry(p, q, log_p - log_q, self.divergence)
        # Where the whole tail of the student underflows in the tile, nothing takes the gradient, however steep it is.
        steepest = torch.finfo(state.dtype).max
        tail_slope_of_one = torch.where(p > 0, tail_slope / p, 0).clamp(-steepest, steepest)
        return value + tail_value, slope + tail_slope, tail_slope_of_one

    def _clipped(self, value: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Values after the clip of a token, and the weights of their gradients."""
        weight = self.unit_weights[rows] * (self._gain * self.divergence.scale)
        limit = self.divergence.token_clip
        if limit is None:
            return value, weight
        if self._sampled:
            return value.clamp(-limit, limit), weight
        return value.clamp(max=limit), torch.where(value > limit, 0, weight)

    def finish(self, n_terms: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the tokens [N] and terms [T, N]."""
        found = [torch.cat(x) for x in zip(*self._found, strict=True)] or [wide(like.new_zeros(0))] * n_terms
        losses = scaled(self.token_weights.to(found[0].dtype), found[0])
        if self.policy is not None:
            losses = losses + scaled(self.policy.weights, found[-1])
        return losses, torch.stack([term.to(self.dtype) for term in found])


def divergence_of(call: Call) -> Divergence:
    """The divergence that a call was given."""
    given = {}
    for field in dataclasses.fields(Divergence):
        given[field.name] = call.options.get(field.name, call.number(field.name))
    given |= {"top_k": call.integer("top_k"), "temperature_squared": given["temperature_squared"] == "True"}
    return Divergence(**given)


def _rows(call: Call, index: itertools.count, count: int, kind: str) -> list[tuple[float | Tensor, Tensor]]:
    """The next ``count`` addends (coefficient, hidden states or logits) of the target."""
    rows = []
    for i in itertools.islice(index, count):
        of_tokens = call.get(f"row{i}_coefficient")
        rows.append((call.number(f"row{i}_coefficient") if of_tokens is None else of_tokens, call[f"row{i}_{kind}"]))
    return rows


def linear(call: Call) -> Outcome:
    """Losses [N], terms, unit and gradients from hidden states."""
    counts, index = [int(x) for x in call.options["head_rows"].split(",")], itertools.count()
    heads = [call.head("student"), *(call.head(f"head{i}") for i in range(len(counts)))]
    shard = call.shard(heads)
    student, *targets = (head.first(shard.columns) for head in heads)
    pairs = zip(targets, counts, strict=True)
    parts = [Part(head, _rows(call, index, count, "hidden"), call.live) for head, count in pairs]
    decides = call.options["decides_last"] == "True"  # the last row is no addend, but decides about the support
    rows = [ComposedRow(x) for x in ([parts[:-1], parts[-1:]] if decides else [parts])]
    hidden, temperature = call["student_hidden"], call.number("temperature")
    transforms = student.transform(temperature), LogitTransform(inv_temperature=1.0 / temperature)
    loss = DivergenceLoss(call, transforms[0].gain, shard.total, shard.local(call.get("ids")), shard)
    gradients = StudentGradients(call, shard.columns, len(hidden))
    views = [gradients.view("student_hidden")] if call.needs else []
    source = LinearSource(
        [StackedRows(student, [hidden], call.live), *rows],
        transforms,
        call.integer("workspace_bytes"),
        shard,
        call.dtype,
        views,
    )
    sweep(source, call.backend, loss, gradients.sink(views, source.plan))
    shard.sum(gradients.by_name["student_hidden"])
    return *loss.finish(len(call.options["terms"].split(",")), source.like), loss.unit, gradients.by_name


def dense(call: Call) -> Outcome:
    """The same from logits that the caller holds."""
    logits, vocab = call["student_logits"], call.integer("vocab_size")
    addends = _rows(call, itertools.count(), int(call.options["head_rows"]), "logits")
    transform = LogitTransform(inv_temperature=1.0 / call.number("temperature"))
    decides = call.options["support"] == "plausible"
    source = DenseSource([[(1.0, logits)], addends], transform, vocab, DENSE_ROWS, call.dtype, decides, call.live)
    loss = DivergenceLoss(call, transform.gain, vocab, call.get("ids"), source.shard)
    d_logits = call.logit_gradient("student_logits", vocab, written=True)
    sweep(source, call.backend, loss, DenseSink([d_logits]) if call.needs else None)
    return *loss.finish(len(call.options["terms"].split(",")), source.like), loss.unit, {"student_logits": d_logits}
