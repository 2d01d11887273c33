"""The registered operators of the VGS objective: its loss and gradients in one forward, scaled in the backward.

Each is a sequence of sweeps over logit rows, with the [N]-vector arithmetic of steering.py between them.
"""

import functools

import torch
from torch import Tensor

from .objective import VGSObjective
from .parallel import VocabularyShard
from .plan import GradientView
from .policy import PolicyGradient
from .registration import cast, empty_gradients, head, head_gradient, logit_gradient, register, wanted
from .rows import LogitTransform, RowCoefficients, Statistics, accumulation_dtype
from .sinks import DenseSink, LinearSink
from .steering import Steering
from .sweep import DenseSource, LinearSource, StackedRows, guard, row_backend, sweep

#: Rows of the ``terms`` that the VGS operators return; ``target_logps`` and ``policy`` follow if asked for.
VGS_TERMS = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds")

#: Tokens per tile of logits that the caller holds, in the PyTorch backend: a column block stays in the cache.
DENSE_ROWS = 256


def _pair_coefficients(state: Tensor, weights: Tensor, gain: float) -> RowCoefficients:
    """Scalars of the gradient of sum_n weights_n * KL(p || q)."""
    mean_gap = Statistics(state).mean("s_gap").to(state.dtype)
    return RowCoefficients((weights * gain).to(state.dtype), mean_gap, torch.zeros_like(mean_gap))


def _linear_vgs(
    hidden: Tensor,
    text_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_text_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    token_weights: Tensor,
    target_ids: Tensor | None,
    vds: Tensor | None,
    vds_threshold: Tensor | None,
    trajectory_ids: Tensor | None,
    group_name: str | None,
    advantages: Tensor | None,
    policy_weights: Tensor | None,
    old_logps: Tensor | None,
    epsilons: list[float],
    gamma: float,
    lam: float,
    vds_quantile: float,
    eta: float,
    temperature: float,
    detach_prior: bool,
    schedule: str,
    adaptive_quantile: float,
    vds_scope: str,
    vocab: int | None,
    vocab_group: str | None,
    scales: list[float],
    softcaps: list[float],
    workspace_bytes: int,
    backend: str,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, text_hidden, weight, bias, teacher_hidden, teacher_text_hidden, teacher_weight, teacher_bias = cast(
        compute_dtype,
        [hidden, text_hidden, weight, bias, teacher_hidden, teacher_text_hidden, teacher_weight, teacher_bias],
    )
    objective = VGSObjective(
        gamma, lam, vds_quantile, eta, temperature, detach_prior, schedule, adaptive_quantile, vds_scope
    )
    shard = VocabularyShard.of(vocab_group, [weight, teacher_weight], vocab, target_ids)
    student, teacher = (
        head(w, b, shard.columns, scale, softcap, temperature)
        for w, b, scale, softcap in zip((weight, teacher_weight), (bias, teacher_bias), scales, softcaps, strict=True)
    )
    transforms = (student.transform, teacher.transform)
    rows = row_backend(backend)
    dtype = accumulation_dtype(hidden)
    with guard(hidden.device):
        policy = PolicyGradient.of(advantages, policy_weights, old_logps, epsilons, dtype)
        steering = Steering(
            objective, token_weights, vds, vds_threshold, trajectory_ids, group_name, student.transform, dtype,
            policy, shard.local(target_ids),
        )  # fmt: skip
        teacher_rows = StackedRows(teacher, [teacher_hidden, teacher_text_hidden])
        if steering.needs_vds_first and any(needs):
            # KL(q_I || q_x) of every token: a pair of the teacher's rows, values only.
            pair = LinearSource([teacher_rows], (teacher.transform, teacher.transform), workspace_bytes, shard)
            steering.vds = Statistics(sweep(pair, rows)[0]).standard.to(dtype)
            steering.find_limits()
            del pair  # frees the slabs

        need_hidden, need_text, need_weight, need_bias = needs
        d_hidden, d_text, d_bias = empty_gradients(
            [need_hidden, need_text, need_bias], [hidden, text_hidden, bias], dtype
        )
        d_weight = head_gradient(need_weight, weight, shard.columns, len(hidden), dtype)
        need_head = need_weight or need_bias
        head_gradients = (wanted(d_weight[: shard.columns], need_weight), wanted(d_bias[: shard.columns], need_bias))

        # Phase 1: standard + gamma * visual, on all four rows. The language term comes with it where the gate is known
        # and either all text-only rows have gradient anyway or the host may count the gated ones, and where the head
        # is frozen: then ungated tokens are taken out afterwards.
        prior = not detach_prior and gamma > 0 and (need_text or need_head)
        language = lam > 0 and (need_text or need_head)
        gate_known = steering.limits is not None
        at_once = language and ((gate_known and (prior or steering.counts_gated_tokens)) or not (prior or need_head))
        compact = at_once and gate_known and not prior and steering.counts_gated_tokens
        views = []
        if need_hidden or need_head or prior or at_once:
            views.append(GradientView(hidden, wanted(d_hidden, need_hidden)))
        if prior or at_once:
            alpha = 1.0 if prior else lam
            views.append(GradientView(text_hidden, wanted(d_text, need_text), alpha, compact=compact))
        source = LinearSource(
            [StackedRows(student, [hidden, text_hidden]), teacher_rows], transforms, workspace_bytes, shard, views
        )
        coefficients = functools.partial(
            steering.coefficients, live_prior=prior, language=(lam if prior else 1.0) if at_once else 0.0
        )
        sink = LinearSink(views, student.weight, *head_gradients, source.plan) if views else None
        state, target_logits = sweep(source, rows, coefficients=coefficients, sink=sink, target_ids=target_ids)
        loss, terms = steering.finish(state, target_logits)
        if at_once and not gate_known:
            d_text.masked_fill_(~steering.gate.unsqueeze(1), 0)

        # Phase 2: language preservation, the pair (a, w) of the gated tokens. Their statistics are taken again: in a
        # GEMM of another shape the logits are rounded otherwise, and p * (gap - mean_gap) would no longer cancel.
        if language and not at_once:
            del source, sink  # frees the slabs
            gated = steering.gated_tokens()
            view = GradientView(text_hidden, wanted(d_text, need_text), lam, gated)
            source = LinearSource(
                [StackedRows(student, [text_hidden], gated), StackedRows(teacher, [teacher_text_hidden], gated)],
                transforms,
                workspace_bytes,
                shard,
                [view],
            )
            sink = LinearSink([view], student.weight, *head_gradients, source.plan, add=True)
            weights = steering.language_weights()[gated]
            gain = student.transform.gain

            def pair(at: slice, state: Tensor, _: Tensor | None) -> RowCoefficients:
                return _pair_coefficients(state, weights[at], gain)

            sweep(source, rows, coefficients=pair, sink=sink)
        shard.sum(d_hidden, d_text if prior or language else None)
    return loss, terms, steering.unit, d_hidden, d_text, d_weight, d_bias


def _dense_vgs(
    logits: Tensor,
    text_logits: Tensor,
    teacher_logits: Tensor,
    teacher_text_logits: Tensor,
    token_weights: Tensor,
    target_ids: Tensor | None,
    vds: Tensor | None,
    vds_threshold: Tensor | None,
    trajectory_ids: Tensor | None,
    group_name: str | None,
    advantages: Tensor | None,
    policy_weights: Tensor | None,
    old_logps: Tensor | None,
    epsilons: list[float],
    gamma: float,
    lam: float,
    vds_quantile: float,
    eta: float,
    temperature: float,
    detach_prior: bool,
    schedule: str,
    adaptive_quantile: float,
    vds_scope: str,
    vocab: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    objective = VGSObjective(
        gamma, lam, vds_quantile, eta, temperature, detach_prior, schedule, adaptive_quantile, vds_scope
    )
    transform = LogitTransform(inv_temperature=1.0 / temperature)
    rows = row_backend(backend)
    dtype = accumulation_dtype(logits)
    tile_rows = max(len(logits), 1) if backend == "triton" else DENSE_ROWS
    with guard(logits.device):
        policy = PolicyGradient.of(advantages, policy_weights, old_logps, epsilons, dtype)
        steering = Steering(
            objective, token_weights, vds, vds_threshold, trajectory_ids, group_name, transform, dtype,
            policy, target_ids,
        )  # fmt: skip
        four = [logits, teacher_logits, text_logits, teacher_text_logits]
        source = DenseSource(four, transform, vocab, tile_rows)
        state, target_logits = sweep(source, rows, target_ids=target_ids)
        loss, terms = steering.finish(state, target_logits)

        need_student, need_text = needs
        prior = not detach_prior and gamma > 0 and need_text
        language = lam if need_text else 0.0
        d_student = logit_gradient(need_student, logits, vocab, written=True)
        d_text = logit_gradient(need_text, text_logits, vocab, written=prior or language > 0)
        if need_student or prior or language:
            # The two come from one sweep: the student's gradient is formed even where only the other is wanted.
            d_view = d_student if need_student else logits.new_empty(logits.shape)
            sink = DenseSink(d_view, d_text if prior or language else None)
            coefficients = functools.partial(steering.coefficients, live_prior=prior, language=language)
            sweep(source, rows, state, target_logits, coefficients, sink)
    return loss, terms, steering.unit, d_student, d_text


linear_vgs = register("linear_vgs", _linear_vgs, ("hidden", "text_hidden", "weight", "bias"), len(VGS_TERMS))
dense_vgs = register("dense_vgs", _dense_vgs, ("logits", "text_logits"), len(VGS_TERMS), dense=True)
