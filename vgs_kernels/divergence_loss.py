"""One divergence between the student's rows and a composed target: supports, values, gradients, tile by tile.

A first sweep over a tile takes the rows' statistics, a second one sums entries of the normalised rows, a third one
writes their gradient.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TypeVar

import torch
from torch import Tensor

from .active_columns import SHARES
from .arguments import Call, StudentGradients
from .divergence import Divergence
from .driver import Loss, Tiles, sweep
from .gradients import DenseSink
from .parallel import VocabularyShard
from .policy import PolicyGradient, unit_weights
from .rows import Backend
from .rows.entries_torch import SUMS, TAILS, entry
from .rows.layout import LARGE, LogitTransform, RowCoefficients, Statistics, scaled, wide
from .sources import DENSE_ROWS, ComposedRow, DenseSource, LinearSource, Part, StackedRows

#: KLs below this, in nats, are summed by entries: from statistics in float32 they would be right to 1e-4 of this.
NEARLY_EQUAL = 0.01
#: Terms of the loss in the order of the operator's rows; ``target_logps`` and ``policy`` follow if asked for.
TERMS = ("divergence", "entropy")

Settings = TypeVar("Settings")
Outcome = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]


class DivergenceLoss(Loss):
    """Values and scalars of the gradient of one divergence and of a policy term.

    Args:
        divergence: its settings.
        token_weights: [N] of the tokens' values.
        gain: d logits / d projection of the student.
        shard: the columns of the vocabulary here; adds up what its ranks have of a sum over all.
        backend: who works on tiles.
        ids: [N] columns of the whole vocabulary, or None.
        policy: or None.
        unit: what the gradient's weights are divided by; None: their own, see ``policy.unit_weights``.
        gradient_alone: whether nobody asks for the values.
    """

    def __init__(
        self,
        divergence: Divergence,
        token_weights: Tensor,
        gain: float,
        shard: VocabularyShard,
        backend: Backend,
        ids: Tensor | None = None,
        policy: PolicyGradient | None = None,
        unit: Tensor | None = None,
        gradient_alone: bool = False,
    ) -> None:
        if divergence.top_k is not None and divergence.top_k > shard.total:
            raise ValueError(f"top_k must be at most the vocabulary's {shard.total} entries, got {divergence.top_k}.")
        super().__init__(shard.local(ids))
        self.divergence, self.policy = divergence, policy
        self._weights, self._shard, self._gain, self._totals = token_weights, shard, gain, backend.totals
        self.unit_weights, self.unit = token_weights, unit
        if unit is None:
            self.unit_weights, self.unit = unit_weights(token_weights, token_weights.dtype, policy=policy)
        self._gradient_alone = gradient_alone
        self._sampled = divergence.kind == "sampled_reverse_kl"
        self.picks = 2 if self._sampled else 1
        self._found: list[list[Tensor]] = []

    def settle(self, rows: slice, state: Tensor, picked: Tensor | None, tiles: Tiles) -> RowCoefficients:
        x = Statistics(state)
        logps = None if picked is None else x.log_probability(picked[0])
        if self._sampled:
            value = logps - x.log_probability(picked[1], "t")
            scalars = {"mean": torch.zeros_like(value), "top": torch.zeros_like(value)}
        else:
            value, scalars = self._value(x, state, tiles)
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
        scalars = {name: x.to(state.dtype) for name, x in {**scalars, "weight": weight}.items()}
        if pull is not None:
            scalars |= {"policy": pull.to(state.dtype), "chosen": self.ids[rows]}
        return RowCoefficients(**scalars)

    def _value(self, x: Statistics, state: Tensor, tiles: Tiles) -> tuple[Tensor, dict[str, Tensor]]:
        """Values [R] before clipping, and the scalars of the gradient before weights.

        A KL follows from the statistics. Where their sums nearly cancel, for the rows are nearly equal or an entry has
        all the mass, entries are summed. So they are of any other divergence, and of all tokens where the host would
        have to wait for the device to know which.
        """
        limit = tiles.limit if self.divergence.support == "student_top_k" else None
        kind, plain = self.divergence.kind, self.divergence.clip is None and limit is None
        if state.device.type != "cpu" or not plain or kind not in ("reverse_kl", "forward_kl"):
            return self._summed(x, state, tiles, slice(None), limit)
        row = "s" if kind == "reverse_kl" else "t"
        value = x.kl(f"{row}_gap")
        mean = value.clone() if kind == "reverse_kl" else torch.full_like(value, -1)
        scalars = {"mean": mean, "top": torch.zeros_like(value)}
        needed = x["s_sum"] < 1 / LARGE
        if not self._gradient_alone:
            needed |= (value < NEARLY_EQUAL) & ~x.near(f"{row}_rest")
        at = needed.nonzero().squeeze(1)
        value[at], exact = self._summed(x, state[:, at], tiles, at, limit)
        for name, values in scalars.items():
            values[at] = exact[name]
        return value, scalars

    def _summed(
        self, x: Statistics, state: Tensor, tiles: Tiles, at: Tensor | slice, limit: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same by sums over entries, of the tokens ``at``, whose state this is; with a limit, of all tokens."""
        sums = state.new_zeros(len(SUMS), state.shape[1])
        tails = state.new_full((len(TAILS), state.shape[1]), -torch.inf)
        for _, tile in tiles if state.shape[1] else ():
            here = tile.pair_at(at) if isinstance(at, Tensor) else tile
            self._totals(here, state, self.divergence, limit, sums, tails)
        self._shard.sum(sums)
        value, slope, rest, top = wide(sums)
        of_tail = {}
        if limit is not None:
            self._shard.sum_exponentials(tails)
            log_p, log_q = (tail - x[f"{name}_sum"].log() for tail, name in zip(wide(tails), "st", strict=True))
            p, q = log_p.exp(), log_q.exp()
            tail_value, tail_slope = entry(p, q, log_p - log_q, self.divergence)
            value, slope, rest = value + tail_value, slope + tail_slope, rest + p
            of_tail = {"tail_slope": tail_slope, "tail_log": tails[0], "limit": limit}
        # (1 - p) * slope - p * all other slopes, of the entry with all the mass.
        return value, {"mean": slope + top, "top": rest * top - (1 - rest) * slope, **of_tail}

    def _clipped(self, value: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Values after the clip of a token, and the weights of their gradients."""
        weight = self.unit_weights[rows] * (self._gain * self.divergence.scale)
        limit = self.divergence.token_clip
        if limit is None:
            return value, weight
        if self._sampled:
            return value.clamp(-limit, limit), weight
        return value.clamp(max=limit), torch.where(value > limit, 0, weight)

    @property
    def values(self) -> Tensor:
        """[N] values of all tokens, once they are settled."""
        return torch.cat([found[0] for found in self._found])

    def finish(self, n_terms: int) -> tuple[Tensor, Tensor]:
        """Losses of the tokens [N] and terms [T, N]."""
        found = [torch.cat(x) for x in zip(*self._found, strict=True)] or [wide(self._weights)] * n_terms
        losses = scaled(self._weights.to(found[0].dtype), found[0])
        if self.policy is not None:
            losses = losses + scaled(self.policy.weights, found[-1])
        return losses, torch.stack([term.to(self._weights.dtype) for term in found])


def settings(kind: type[Settings], call: Call) -> Settings:
    """The divergence or objective that a call was given."""
    flags = {"True": True, "False": False}
    given = {x.name: call.options.get(x.name, call.number(x.name)) for x in dataclasses.fields(kind)}
    return kind(**{name: int(x) if name == "top_k" and x else flags.get(x, x) for name, x in given.items()})


def _loss(call: Call, gain: float, shard: VocabularyShard) -> DivergenceLoss:
    weights = call["token_weights"].to(call.dtype)
    return DivergenceLoss(settings(Divergence, call), weights, gain, shard, call.backend, call.get("ids"), call.policy)


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
    loss = _loss(call, transforms[0].gain, shard)
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
    losses, terms = loss.finish(len(set(call.terms) - set(SHARES)))
    return losses, gradients.with_shares(terms, shard), loss.unit, gradients.by_name


def dense(call: Call) -> Outcome:
    """The same from logits that the caller holds."""
    logits, vocab = call["student_logits"], call.integer("vocab_size")
    addends = _rows(call, itertools.count(), int(call.options["head_rows"]), "logits")
    transform = LogitTransform(inv_temperature=1.0 / call.number("temperature"))
    decides = call.options["support"] == "plausible"
    source = DenseSource([[(1.0, logits)], addends], transform, vocab, DENSE_ROWS, call.dtype, decides, call.live)
    loss = _loss(call, transform.gain, source.shard)
    d_logits = call.logit_gradient("student_logits", vocab, written=True)
    sweep(source, call.backend, loss, DenseSink([d_logits]) if call.needs else None)
    return *loss.finish(len(call.terms)), loss.unit, {"student_logits": d_logits}
