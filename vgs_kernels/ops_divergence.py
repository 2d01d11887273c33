"""The registered operators of one divergence to one composed target; see registration.py for what they return."""

import itertools

import torch
from torch import Tensor

from .divergence import Divergence
from .divergence_sweep import DivergenceSweep, Outcome
from .ops import DENSE_ROWS
from .parallel import VocabularyShard
from .plan import GradientView
from .policy import PolicyGradient, unit_weights
from .registration import cast, empty_gradients, head, head_gradient, logit_gradient, register, register_values, wanted
from .rows import LogitTransform, accumulation_dtype, scaled
from .sinks import DenseSink, LinearSink
from .sweep import Addend, ComposedPart, ComposedRow, ComposedSource, LinearSource, StackedRows, guard

#: Rows of the ``terms``; ``target_logps`` and ``policy`` follow if asked for.
DIVERGENCE_TERMS = ("divergence", "entropy")


def _check_count(divergence: Divergence, total: int) -> None:
    if divergence.top_k is not None and divergence.top_k > total:
        raise ValueError(f"top_k must be at most the vocabulary's {total} entries, got {divergence.top_k}.")


def _addends(coefficients: list[float], token_coefficients: list[Tensor | None], rows: list[Tensor]) -> list[Addend]:
    """Rows with their coefficients: those of each token, where there are some."""
    pairs = zip(coefficients, token_coefficients, rows, strict=True)
    return [Addend(number if of_tokens is None else of_tokens, row) for number, of_tokens, row in pairs]


def _finish(
    outcome: Outcome, token_weights: Tensor, policy: PolicyGradient | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss and terms."""
    loss = scaled(token_weights.to(outcome.divergence.dtype), outcome.divergence).sum()
    if policy is not None:
        loss = loss + scaled(policy.weights, outcome.policy).sum()
    terms = (outcome.divergence, outcome.entropy, outcome.target_logps, outcome.policy)
    return loss.to(dtype), torch.stack([term.to(dtype) for term in terms if term is not None])


def _linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_hiddens: list[Tensor],
    token_coefficients: list[Tensor | None],
    target_weights: list[Tensor],
    target_biases: list[Tensor | None],
    token_weights: Tensor,
    target_ids: Tensor | None,
    advantages: Tensor | None,
    policy_weights: Tensor | None,
    old_logps: Tensor | None,
    epsilons: list[float],
    coefficients: list[float],
    head_rows: list[int],
    divergence: str,
    beta: float,
    support: str,
    top_k: int | None,
    plausibility: float | None,
    clip: float | None,
    token_clip: float | None,
    temperature: float,
    temperature_squared: bool,
    decides_last: bool,
    vocab: int | None,
    vocab_group: str | None,
    scales: list[float],
    softcaps: list[float],
    workspace_bytes: int,
    backend: str,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``head_rows``: how many of the target's rows, one after the other, each of its heads projects. ``decides_last``:
    the last one is no addend, but decides about the support."""
    hidden, weight, bias = cast(compute_dtype, [hidden, weight, bias])
    target_hiddens, target_weights, target_biases = (
        cast(compute_dtype, x) for x in (target_hiddens, target_weights, target_biases)
    )
    knobs = Divergence(
        divergence, beta, support, top_k, plausibility, clip, token_clip, temperature, temperature_squared
    )
    shard = VocabularyShard.of(vocab_group, [weight, *target_weights], vocab, target_ids)
    _check_count(knobs, shard.total)
    student, *targets = (
        head(w, b, shard.columns, scale, softcap, temperature)
        for w, b, scale, softcap in zip(
            [weight, *target_weights], [bias, *target_biases], scales, softcaps, strict=True
        )
    )
    dtype = accumulation_dtype(hidden)
    addends = iter(_addends(coefficients, token_coefficients, target_hiddens))
    parts = [
        ComposedPart(x, list(itertools.islice(addends, count))) for x, count in zip(targets, head_rows, strict=True)
    ]
    rows = [ComposedRow(x) for x in ([parts[:-1], parts[-1:]] if decides_last else [parts])]
    with guard(hidden.device):
        policy = PolicyGradient.of(advantages, policy_weights, old_logps, epsilons, dtype)
        weights, unit = unit_weights(token_weights, dtype, policy=policy)
        need_hidden, need_weight, need_bias = needs
        d_hidden, d_bias = empty_gradients([need_hidden, need_bias], [hidden, bias], dtype)
        d_weight = head_gradient(need_weight, weight, shard.columns, len(hidden), dtype)
        views = [GradientView(hidden, wanted(d_hidden, need_hidden))] if any(needs) else []
        source = LinearSource(
            [StackedRows(student, [hidden]), *rows],
            (student.transform, LogitTransform(inv_temperature=1.0 / temperature)),
            workspace_bytes,
            shard,
            views,
        )
        head_gradients = (wanted(d_weight[: shard.columns], need_weight), wanted(d_bias[: shard.columns], need_bias))
        sink = LinearSink(views, student.weight, *head_gradients, source.plan) if views else None
        gain = student.transform.gain
        outcome = DivergenceSweep(knobs, source, backend, weights, unit, gain, policy, target_ids).run(sink)
        shard.sum(d_hidden)
        loss, terms = _finish(outcome, token_weights, policy, dtype)
    return loss, terms, unit, d_hidden, d_weight, d_bias


def _dense_divergence(
    logits: Tensor,
    target_logits: list[Tensor],
    token_coefficients: list[Tensor | None],
    token_weights: Tensor,
    target_ids: Tensor | None,
    advantages: Tensor | None,
    policy_weights: Tensor | None,
    old_logps: Tensor | None,
    epsilons: list[float],
    coefficients: list[float],
    divergence: str,
    beta: float,
    support: str,
    top_k: int | None,
    plausibility: float | None,
    clip: float | None,
    token_clip: float | None,
    temperature: float,
    temperature_squared: bool,
    vocab: int,
    backend: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    knobs = Divergence(
        divergence, beta, support, top_k, plausibility, clip, token_clip, temperature, temperature_squared
    )
    _check_count(knobs, vocab)
    dtype = accumulation_dtype(logits)
    transform = LogitTransform(inv_temperature=1.0 / temperature)
    with guard(logits.device):
        policy = PolicyGradient.of(advantages, policy_weights, old_logps, epsilons, dtype)
        weights, unit = unit_weights(token_weights, dtype, policy=policy)
        d_logits = logit_gradient(needs[0], logits, vocab, written=True)
        addends = _addends(coefficients, token_coefficients, target_logits)
        source = ComposedSource(logits, addends, transform, vocab, DENSE_ROWS, support == "plausible")
        sink = DenseSink(d_logits, None) if needs[0] else None
        gain = transform.gain
        outcome = DivergenceSweep(knobs, source, backend, weights, unit, gain, policy, target_ids).run(sink)
        loss, terms = _finish(outcome, token_weights, policy, dtype)
    return loss, terms, unit, d_logits


linear_divergence = register(
    "linear_divergence", _linear_divergence, ("hidden", "weight", "bias"), len(DIVERGENCE_TERMS)
)
dense_divergence = register("dense_divergence", _dense_divergence, ("logits",), len(DIVERGENCE_TERMS), dense=True)
linear_divergence_values = register_values(
    "linear_divergence_values", linear_divergence, _linear_divergence, ("hidden", "weight", "bias")
)
dense_divergence_values = register_values("dense_divergence_values", dense_divergence, _dense_divergence, ("logits",))
