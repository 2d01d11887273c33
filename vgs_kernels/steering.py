"""The VGS loss of one call: what happens between the sweeps, as arithmetic on [N] vectors, and the order of the sweeps.

This is the room where the method is readable and changeable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import gating
from .arguments import Call, StudentGradients
from .divergence import Divergence
from .divergence_loss import DivergenceLoss, Outcome, settings
from .driver import Loss, Tiles, sweep
from .gated_rows import GatedRows, share_beside
from .gradients import DenseSink
from .objective import VGSObjective
from .parallel import VocabularyShard
from .plan import GradientView, Plan
from .policy import unit_weights
from .rows.layout import LogitTransform, RowCoefficients, RowTile, Statistics, named, scaled, wide
from .sources import DENSE_ROWS, DenseSource, LinearSource, Source, StackedRows, TileSource

#: Terms of the loss in the order of the operator's rows; ``target_logps`` and ``policy`` follow if asked for.
TERMS = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds")
#: Calls of so few tokens fit into one tile together with a copy of two of its rows.
_FEW_TOKENS = 256


class VGSLoss(Loss):
    """standard + gamma * visual of four rows, the gate, and in the end loss and terms.

    Args:
        call: the arguments. objective: of the call.
        gain: d logits / d projection of the student.
        ids: columns of this shard, or None.
        live_prior: whether p_x inside q* receives gradient.
    """

    def __init__(self, call: Call, objective: VGSObjective, gain: float, ids: Tensor | None, live_prior: bool) -> None:
        super().__init__(ids)
        self.objective, self._backend = objective, call.backend
        self.dtype, self.gain, self.live_prior = call.dtype, gain, live_prior
        self.policy = call.policy
        self.unit_weights, self.unit = unit_weights(call["token_weights"], self.dtype, self.objective.eta, self.policy)
        if self.policy is not None:
            self.policy.prepare(self.gain / self.unit)
        self._of_logits = self.unit_weights if self.gain == 1 else self.gain * self.unit_weights
        vds, limits = call.get("vds"), call.get("vds_threshold")
        self.vds = None if vds is None else vds.to(self.dtype)
        self._counted = call.get("counted")
        self._scope = (call.get("trajectory_ids"), call.options.get("process_group"), self._counted)
        self.of_call = self.objective.vds_scope == "call" and limits is None
        self._seen, self._formed = [], []
        self.gated: GatedRows | None = None
        self.gate_first = False
        self.limits: list[Tensor] | None = None
        self.gate: Tensor | None = None
        if limits is not None:
            self.limits = [limit.expand(len(self.unit_weights)) for limit in limits.to(self.dtype).reshape(-1, 1)]
        elif self.vds is not None:
            self._find_limits()

    @property
    def guessed(self) -> bool:
        """Whether language terms were formed before the gate was known."""
        return bool(self._formed)

    @property
    def needs_vds_first(self) -> bool:
        """Whether the gradient of a token depends on the scores of all others."""
        return self.objective.schedule == "adaptive" and self.limits is None

    def use_scores(self, vds: Tensor) -> None:
        """Take the visual dependency scores [N] from an earlier sweep."""
        self.vds = vds
        self._find_limits()

    def _find_limits(self) -> None:
        self.limits = gating.thresholds(self.vds, self.objective, *self._scope)

    def settle(self, rows: slice, state: Tensor, picked: Tensor | None, tiles: Tiles) -> RowCoefficients | None:
        """Scalars of the gradient of standard + gamma * visual and of the policy term."""
        if self.needs_vds_first:
            return None  # no gradient is wanted
        found = RowCoefficients(self._of_logits[rows], self._gamma_of(state, rows), live_prior=self.live_prior)
        if self.gated is not None:
            if self.gate_first:
                self.settle_gate(Statistics(state))
                self.gated.know(self.vds, self.limits[-1])
            found = found._replace(**self.gated.form(rows, tiles.whole, state))
        if self.policy is None:
            return found
        policy = self.policy.slopes.at(rows)
        _, pull = self._backend.token_scalars(state, picked, found.weight, None, None, policy)
        return found._replace(policy=pull, chosen=self.ids[rows])

    @functools.cached_property
    def gamma(self) -> Tensor:
        """[N]; of the adaptive schedule once the scores and their limits are known."""
        return gating.token_gamma(self.unit_weights if self.vds is None else self.vds, self.objective, self.limits)

    def _gamma_of(self, state: Tensor, rows: slice) -> Tensor:
        if self.objective.schedule == "constant" or self.vds is not None:
            return self.gamma[rows]
        vds = Statistics(state).kl("t_view_gap").to(self.dtype)
        return gating.token_gamma(vds, self.objective, [limit[rows] for limit in self.limits])

    def gate_of(self, vds: Tensor, rows: slice, limits: list[Tensor]) -> Tensor:
        """[R] bool: the gate of these tokens for these limits; ``vds`` are their scores unless given."""
        vds = vds.to(self.dtype) if self.vds is None else self.vds[rows]
        gate = vds > limits[-1][rows]
        return gate if self._counted is None else gate & self._counted[rows]

    def form_now(self, state: Tensor, rows: slice) -> Tensor:
        """Indices among these tokens of those whose language term is to be formed now: those that pass the gate or,
        before its limit is known, the quantile of the tokens so far. A few of these are wrong, see ``unformed``; what
        is not finite could not be taken back and waits."""
        x = Statistics(state)
        vds = x.kl("t_view_gap")
        limits = self.limits
        if limits is None:
            self._seen.append(vds.to(self.dtype))
            counted = None if self._counted is None else self._counted[: rows.stop]
            limits = gating.thresholds(torch.cat(self._seen), self.objective, counted=counted)
        self._formed.append(self.gate_of(vds, rows, limits) & x.kl("a_gap").isfinite())
        return self._formed[-1].nonzero().squeeze(1)

    def form_beside(self, view: GradientView, plan: Plan, *, gate_first: bool) -> GatedRows:
        """Form the language term beside the plan's gradient blocks: of tokens that are likely to pass the gate or, with
        ``gate_first``, of those that do, for all tokens are in one tile."""
        objective, limits = self.objective, None if self.limits is None else self.limits[-1]
        weights, scores = self._of_logits * objective.lam, None if limits is None else self.vds
        settings = (plan.gradient_rows, objective.vds_quantile, limits, scores, self._counted)
        self.gated, self.gate_first = GatedRows(view, self._backend, weights, *settings), gate_first
        self._formed.append(self.gated.formed)
        return self.gated

    def settle_gate(self, x: Statistics) -> None:
        """The gate, from the statistics of all tokens."""
        if self.vds is None:
            self.vds = x.kl("t_view_gap").to(self.dtype)
        if self.limits is None:
            self._find_limits()
        self.gate = self.gate_of(self.vds, slice(None), self.limits)

    def finish(self, state: Tensor, picked: Tensor | None) -> tuple[Tensor, Tensor]:
        """Losses of the tokens [N] and terms [T, N], from the statistics of all."""
        x = Statistics(state)
        if self.gate is None:
            self.settle_gate(x)
        standard, visual, language = x.kl("s_gap"), x.visual, x.kl("a_gap")
        gamma = self.objective.gamma if self.objective.schedule == "constant" else self.gamma
        preserved = torch.where(self.gate, scaled(self.objective.lam, language), 0)
        losses = scaled(self.unit_weights * self.unit, standard + scaled(gamma, visual) + preserved)
        gate = self.gate.to(standard.dtype)
        terms = [standard, visual, language, wide(self.vds), gate, x.entropy, x.kl("s_view_gap")]
        if picked is not None:
            terms.append(x.log_probability(picked[0]))
        if self.policy is not None:
            terms.append(self.policy.values(terms[-1]))
            losses = losses + scaled(self.policy.weights, terms[-1])
        return losses, torch.stack(terms).to(self.dtype)

    def preservation(self, weights: Tensor, shard: VocabularyShard) -> DivergenceLoss:
        """The gradient of the language term, of a pair of text-only rows with these token weights [R]."""
        return DivergenceLoss(
            Divergence(), weights, self.gain, shard, self._backend, unit=self.unit, gradient_alone=True
        )

    def unformed(self) -> tuple[Tensor, Tensor]:
        """Tokens whose language term is still to be formed, or to be taken back, and with which weights.

        If none has been formed, these are (at least) all gated tokens. Only a quantile of this very call bounds their
        number beforehand; else counting them synchronises a GPU once.
        """
        missing = self.gate.to(self.dtype)
        if self.guessed:
            missing = missing - torch.cat(self._formed).to(self.dtype)
        if self.of_call and not self.guessed:
            count = gating.max_gated(len(self.vds), self.objective)
            scores = self.vds if self._counted is None else self.vds.masked_fill(~self._counted, -torch.inf)
            tokens = torch.topk(scores, count, sorted=False).indices.sort().values
        else:
            tokens = missing.nonzero().squeeze(1)
        return tokens, (self.unit_weights * missing)[tokens]


def linear(call: Call) -> Outcome:
    """Losses [N], terms, unit and gradients from hidden states: up to three phases, each a sweep of its own."""
    hidden, text, teacher_hidden, teacher_text = (
        call[f"{name}hidden"] for name in ("student_", "student_text_", "teacher_", "teacher_text_")
    )
    heads = [call.head("student"), call.head("teacher")]
    objective, shard = settings(VGSObjective, call), call.shard(heads)
    student, teacher = (head.first(shard.columns) for head in heads)
    transforms = tuple(head.transform(objective.temperature) for head in (student, teacher))
    source_options = (call.integer("workspace_bytes"), shard, call.dtype)
    text_gradient = "student_text_hidden" in call.needs or call.needs_head
    prior = not objective.detach_prior and objective.gamma > 0 and text_gradient
    loss = VGSLoss(call, objective, transforms[0].gain, shard.local(call.get("ids")), prior)
    gradients = StudentGradients(call, shard.columns, len(hidden), loss.unit)
    teacher_rows = StackedRows(teacher, [teacher_hidden, teacher_text], call.live)

    # Scores first where gamma depends on them: KL(q_I || q_x) of every token, a pair of the teacher's rows.
    if loss.needs_vds_first and call.needs:
        pair = LinearSource([teacher_rows], (transforms[1], transforms[1]), *source_options)
        scores = DivergenceLoss(Divergence(), loss.unit_weights, 1.0, shard, call.backend)
        loss.use_scores(scores.finish(*sweep(pair, call.backend, scores))[1][0])
        del pair  # frees the slabs

    # standard + gamma * visual, on all four rows.
    views = []
    if "student_hidden" in call.needs or call.needs_head or prior:
        views.append(gradients.view("student_hidden"))
    if prior:
        views.append(gradients.view("student_text_hidden"))
    # Language preservation, the pair (a, w) of the gated tokens. A gate that is known beforehand, or guessed by the
    # tokens so far, lets the term be formed while its rows are in memory: on a CPU by products of its own, elsewhere
    # in slots beside the tokens of a gradient block, for the host would wait to know how many a tile has. If one tile
    # has all tokens, their gate is known in time. A rank of a group may hold no column at all.
    language, text_view = objective.lam > 0 and text_gradient, gradients.view("student_text_hidden")
    here, few = language and not prior and shard.group is None and len(hidden) > 0, len(hidden) <= _FEW_TOKENS
    known_or_guessed = here and (loss.limits is not None or loss.of_call)
    at_once = known_or_guessed and hidden.device.type == "cpu" and text_view.in_place
    beside = known_or_guessed and bool(views) and _takes_slots(call, views[0], text_view)
    at_end = here and few and not at_once and not beside
    source = LinearSource(
        [StackedRows(student, [hidden, text], call.live), teacher_rows],
        transforms,
        *source_options,
        views,
        copied=1 if at_end and hidden.device.type != "cpu" else 0,
        rows_beside=share_beside(objective.vds_quantile) if beside else 0.0,
    )
    at_once, at_end = at_once and source.spans, at_end and source.holds_all
    gate_first = beside and few and source.holds_all and loss.of_call
    beside = beside and source.spans and (gate_first or not _captures(hidden))
    gated = loss.form_beside(text_view, source.plan, gate_first=gate_first) if beside else None

    def preserve(source: Source, view: GradientView, weights: Tensor, known: tuple | None = None) -> None:
        pair = loss.preservation(weights, shard)
        sweep(source, call.backend, pair, gradients.sink([view], source.plan, add=True), known)

    def preserve_here(rows: slice, tile: RowTile, state: Tensor) -> None:
        if at_end:
            loss.settle_gate(Statistics(state))
            at, weights = loss.unformed()
        else:
            at = loss.form_now(state, rows)
            weights = loss.unit_weights[rows][at]
        if len(at):
            view = gradients.view("student_text_hidden", objective.lam, at + rows.start if rows.start else at)
            pair = TileSource(tile.move_text(at), shard, state)
            preserve(pair, view, weights, (language_statistics(state[:, at]), None))

    then = preserve_here if at_once or at_end else None
    sink = gradients.sink(views, source.plan, gated=gated)
    losses, terms = loss.finish(*sweep(source, call.backend, loss, sink, then=then))
    last, late = sink if beside else None, None  # its last block is open
    del source, sink  # frees slabs and blocks
    tokens, weights = loss.unformed() if language and not (at_end or gate_first) else ((), None)

    def project_again(workspace: int, views: Sequence[GradientView] = ()) -> LinearSource:
        """Their pairs of text-only rows. Their statistics are taken again, too: in a GEMM of another shape the logits
        are rounded otherwise, and p * (gap - mean) would no longer cancel."""
        rows = [StackedRows(head, [x], call.live, tokens) for head, x in ((student, text), (teacher, teacher_text))]
        return LinearSource(rows, transforms, workspace, *source_options[1:], views)

    if last is not None:
        late = last.append(tokens) if len(tokens) else None
        if late is not None:
            pair = loss.preservation(weights * objective.lam, shard)
            sweep(project_again(source_options[0] - last.nbytes), call.backend, pair, DenseSink([late]))
        last.close()
        del last
    if len(tokens) and late is None:
        view = gradients.view("student_text_hidden", objective.lam, tokens)
        preserve(project_again(source_options[0], [view]), view, weights)
    of_text = gradients.by_name["student_text_hidden"] if prior or language else None
    if (at_once or beside) and len(tokens) and "student_text_hidden" in call.needs:
        of_text.masked_fill_(~loss.gate.unsqueeze(1), 0)  # what was taken back leaves no rounding
    shard.sum(gradients.by_name["student_hidden"], of_text)
    return losses, gradients.with_shares(terms, shard), gradients.unit, gradients.by_name


def _takes_slots(call: Call, view: GradientView, text: GradientView) -> bool:
    """Whether a view's gradient blocks take text-only rows beside those of its tokens, with lam in them: float16 has no
    room for it."""
    return call.backend.assign is not None and view.dtype == text.dtype == torch.bfloat16


def _captures(like: Tensor) -> bool:
    """Whether launches are captured in a graph: then the host cannot wait to know what was guessed wrong."""
    return like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def dense(call: Call) -> Outcome:
    """The same from logits that the caller holds: statistics, then gradients once the gate is known."""
    objective, vocab = settings(VGSObjective, call), call.integer("vocab_size")
    names = ("student_logits", "teacher_logits", "student_text_logits", "teacher_text_logits")
    s, t, a, w = ([(1.0, call[name])] for name in names)
    transform = LogitTransform(inv_temperature=1.0 / objective.temperature)
    needs_text = "student_text_logits" in call.needs
    prior = not objective.detach_prior and objective.gamma > 0 and needs_text
    language = objective.lam > 0 and needs_text
    loss = VGSLoss(call, objective, transform.gain, call.get("ids"), prior)
    n = len(call["student_logits"])
    whole = call.options["backend"] == "triton" and call.live is None
    tile_rows = max(n, 1) if whole else DENSE_ROWS
    source = DenseSource([s, t, a, w], transform, vocab, tile_rows, call.dtype, live=call.live)
    found = sweep(source, call.backend, Loss(loss.ids))
    losses, terms = loss.finish(*found)

    d_student = call.logit_gradient("student_logits", vocab, written=True)
    d_text = call.logit_gradient("student_text_logits", vocab, written=prior or language)
    if "student_logits" in call.needs or prior:
        # The two come from one sweep: the student's gradient is formed even where only the other is wanted.
        first = d_student if "student_logits" in call.needs else torch.empty_like(call["student_logits"])
        sweep(source, call.backend, loss, DenseSink([first, d_text] if prior else [first]), found)
    if language:
        weights = loss.unit_weights * loss.gate * objective.lam
        tile_rows = DENSE_ROWS if prior else tile_rows
        source = DenseSource([a, w], transform, vocab, tile_rows, call.dtype, live=call.live)
        known = language_statistics(found[0]), None
        sweep(source, call.backend, loss.preservation(weights, source.shard), DenseSink([d_text], add=prior), known)
    return losses, terms, loss.unit, {"student_logits": d_student, "student_text_logits": d_text}


def language_statistics(state: Tensor) -> Tensor:
    """What four rows know of the pair (a, w), as statistics of that pair, without entropy and forward KL."""
    x = named(state)
    unknown = torch.zeros_like(state[0])
    rests = [x["a_rest"], unknown + torch.nan] if "a_rest" in x else []
    return torch.stack([x["a_max"], x["a_sum"], x["w_max"], x["w_sum"], unknown, x["a_gap"], unknown, *rests])
