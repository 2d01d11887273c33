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

from .arguments import Call, StudentGradients
from .divergence import Divergence
from .driver import Loss, Tiles, sweep
from .gradients import DenseSink
from .parallel import VocabularyShard
from .policy import PolicyGradient, unit_weights
from .rows import Backend
from .rows.entries_torch import SUMS, TAILS, entry
from .rows.layout import LARGE, LogitTransform, RowCoefficients, Statistics, scaled, wide
from .rows.picks_torch import clipped, token_values
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
        self._weights, self._shard, self._backend = token_weights, shard, backend
        self.unit_weights, self.unit = token_weights, unit
        if unit is None:
            self.unit_weights, self.unit = unit_weights(token_weights, token_weights.dtype, policy=policy)
        if policy is not None:
            policy.prepare(gain / self.unit)
        self._gradient_alone = gradient_alone
        self.picks = 2 if divergence.sampled else 1
        factor = gain * divergence.scale
        self._of_logits = self.unit_weights if factor == 1 else self.unit_weights * factor
        self._sums = token_weights.new_zeros(len(SUMS), len(token_weights))

    def settle(self, rows: slice, state: Tensor, picked: Tensor | None, tiles: Tiles) -> RowCoefficients:
        sums, policy = self._sums[:, rows], None if self.policy is None else self.policy.slopes.at(rows)
        of_tail = {} if self.divergence.sampled else self._add_up(state, tiles, sums)
        given = state, picked, self._of_logits[rows], sums[0], self.divergence, policy
        weight, pull = self._backend.token_scalars(*given)
        chosen = None if pull is None else self.ids[rows]
        return RowCoefficients(weight, sums=sums, policy=pull, chosen=chosen, **of_tail)

    def _add_up(self, state: Tensor, tiles: Tiles, sums: Tensor) -> dict[str, Tensor]:
        """Fill ``SUMS`` [4, R]; returns the scalars of a tail.

        A KL follows from the statistics. Where their sums nearly cancel, for the rows are nearly equal or an entry has
        all the mass, entries are summed. So they are of any other divergence, and of all tokens where the host would
        have to wait for the device to know which, unless the backend itself ``skips`` the others.
        """
        limit = tiles.limit if self.divergence.support == "student_top_k" else None
        kind, above = self.divergence.kind, None
        if self.divergence.clip is None and limit is None and kind in ("reverse_kl", "forward_kl"):
            above = -torch.inf if self._gradient_alone else NEARLY_EQUAL
        if above is None or state.device.type != "cpu" or self._backend.skips:
            skips = above is not None and self._backend.skips and tiles.spans and self._shard.group is None
            return self._add_entries(state, tiles, sums, slice(None), limit, **({"above": above} if skips else {}))
        x, row = Statistics(state), "s" if kind == "reverse_kl" else "t"
        value = x.kl(f"{row}_gap")
        sums[0], sums[3] = value, value if kind == "reverse_kl" else -1
        needed = (x["s_sum"] < 1 / LARGE) | ((value < above) & ~x.near(f"{row}_rest"))
        at = needed.nonzero().squeeze(1)
        exact = torch.zeros_like(sums[:, at])
        self._add_entries(state[:, at], tiles, exact, at)
        sums[:, at] = exact
        return {}

    def _add_entries(
        self,
        state: Tensor,
        tiles: Tiles,
        sums: Tensor,
        at: Tensor | slice,
        limit: Tensor | None = None,
        **options: float,
    ) -> dict[str, Tensor]:
        """The same by entries, of the tokens ``at``, whose state this is; with a limit, of all tokens."""
        tails = None if limit is None else state.new_full((len(TAILS), state.shape[1]), -torch.inf)
        for _, tile in tiles if state.shape[1] else ():
            here = tile.pair_at(at) if isinstance(at, Tensor) else tile
            self._backend.totals(here, state, self.divergence, limit, sums, tails, **options)
        self._shard.sum(sums)
        if limit is None:
            return {}
        self._shard.sum_exponentials(tails)
        x = Statistics(state)
        log_p, log_q = (tail - x[f"{name}_sum"].log() for tail, name in zip(wide(tails), "st", strict=True))
        value, slope = entry(log_p.exp(), log_q.exp(), log_p - log_q, self.divergence)
        sums[:3] += torch.stack([value, slope, log_p.exp()])
        return {"tail_slope": slope.to(state.dtype), "tail_log": tails[0], "limit": limit}

    def finish(self, state: Tensor, picked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses of the tokens [N] and terms [T, N], from the statistics of all."""
        x, value = Statistics(state), token_values(state, picked, self._sums[0], self.divergence)
        value = clipped(value, self.divergence) * self.divergence.scale
        terms = [value, x.entropy, *([] if picked is None else [x.log_probability(picked[0])])]
        losses = scaled(self._weights.to(value.dtype), value)
        if self.policy is not None:
            terms.append(self.policy.values(terms[-1]))
            losses = losses + scaled(self.policy.weights, terms[-1])
        return losses, torch.stack(terms).to(self._weights.dtype)


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
    gradients = StudentGradients(call, shard.columns, len(hidden), loss.unit)
    views = [gradients.view("student_hidden")] if call.needs else []
    source = LinearSource(
        [StackedRows(student, [hidden], call.live), *rows],
        transforms,
        call.integer("workspace_bytes"),
        shard,
        call.dtype,
        views,
    )
    losses, terms = loss.finish(*sweep(source, call.backend, loss, gradients.sink(views, source.plan)))
    shard.sum(gradients.by_name["student_hidden"])
    return losses, gradients.with_shares(terms, shard), gradients.unit, gradients.by_name


def dense(call: Call) -> Outcome:
    """The same from logits that the caller holds."""
    logits, vocab = call["student_logits"], call.integer("vocab_size")
    addends = _rows(call, itertools.count(), int(call.options["head_rows"]), "logits")
    transform = LogitTransform(inv_temperature=1.0 / call.number("temperature"))
    decides = call.options["support"] == "plausible"
    source = DenseSource([[(1.0, logits)], addends], transform, vocab, DENSE_ROWS, call.dtype, decides, call.live)
    loss = _loss(call, transform.gain, source.shard)
    d_logits = call.logit_gradient("student_logits", vocab, written=True)
    found = sweep(source, call.backend, loss, DenseSink([d_logits]) if call.needs else None)
    return *loss.finish(*found), loss.unit, {"student_logits": d_logits}
