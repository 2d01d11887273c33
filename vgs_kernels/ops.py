"""The registered operators: losses and their gradients in one forward, scaled in the backward.

Registered with ``torch.library`` so that ``torch.compile`` of a caller sees one opaque node. Each is a sequence of
sweeps over logit rows, with the [N]-vector arithmetic of steering.py between them.

An operator's outputs are (loss, terms [K, N], unit, d_*): d_x are gradients in float32 for unit-sized token weights
(so that 16-bit logit gradients keep their range) and ``unit`` is what they are to be multiplied with. A gradient that
is not asked for is an empty tensor.
"""

import functools

import torch
from torch import Tensor

from .objective import VGSObjective
from .parallel import VocabularyShard
from .plan import GradientView
from .rows import LogitTransform, RowCoefficients, Statistics, accumulation_dtype, scaled
from .sinks import DenseSink, LinearSink
from .steering import Steering, unit_weights
from .sweep import ComposedRow, DenseSource, Head, LinearSource, StackedRows, guard, row_backend, sweep

#: Rows of the ``terms`` that the VGS operators return; ``target_logps`` follows if asked for.
VGS_TERMS = ("standard", "visual", "language", "vds", "gate", "entropy", "student_vds")
DIVERGENCE_TERMS = ("divergence", "entropy")

#: Tokens per tile of logits that the caller holds, in the PyTorch backend: a column block stays in the cache.
_DENSE_ROWS = 256


def _head(weight: Tensor, bias: Tensor | None, vocab: int, scale: float, softcap: float, temperature: float) -> Head:
    transform = LogitTransform(scale, softcap or None, 1.0 / temperature)
    return Head(weight[:vocab], None if bias is None else bias[:vocab], transform)


def _cast(dtype: torch.dtype, tensors: list[Tensor | None]) -> list[Tensor | None]:
    """What autocast does to a linear layer's inputs, but inside the operator: gradients keep the parameters' dtype."""
    return [None if x is None else x.to(dtype) for x in tensors]


def _empty_gradients(needs: list[bool], like: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    first = next(x for x in like if x is not None)
    return [
        x.new_zeros(x.shape, dtype=dtype) if need else first.new_empty(0, dtype=dtype)
        for need, x in zip(needs, like, strict=True)
    ]


def _head_gradient(need: bool, weight: Tensor, vocab: int, n: int, dtype: torch.dtype) -> Tensor:
    """Like weight [V, D]; its first ``vocab`` rows are left to the sweep, which overwrites them if there is a token."""
    gradient = weight.new_empty(weight.shape if need else 0, dtype=dtype)
    gradient[vocab if n else 0 :].zero_()
    return gradient


def _logit_gradient(need: bool, logits: Tensor, vocab: int, written: bool) -> Tensor:
    """Like logits [N, V]; its first ``vocab`` columns are left to the sweep if that writes them."""
    gradient = logits.new_empty(logits.shape if need else 0)
    gradient[..., vocab if written else 0 :].zero_()
    return gradient


def _wanted(gradient: Tensor, need: bool) -> Tensor | None:
    return gradient if need else None


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
    hidden, text_hidden, weight, bias, teacher_hidden, teacher_text_hidden, teacher_weight, teacher_bias = _cast(
        compute_dtype,
        [hidden, text_hidden, weight, bias, teacher_hidden, teacher_text_hidden, teacher_weight, teacher_bias],
    )
    objective = VGSObjective(
        gamma, lam, vds_quantile, eta, temperature, detach_prior, schedule, adaptive_quantile, vds_scope
    )
    shard = VocabularyShard.of(vocab_group, [weight, teacher_weight], vocab, target_ids)
    student, teacher = (
        _head(w, b, shard.columns, scale, softcap, temperature)
        for w, b, scale, softcap in zip((weight, teacher_weight), (bias, teacher_bias), scales, softcaps, strict=True)
    )
    transforms = (student.transform, teacher.transform)
    rows = row_backend(backend)
    dtype = accumulation_dtype(hidden)
    with guard(hidden.device):
        steering = Steering(
            objective, token_weights, vds, vds_threshold, trajectory_ids, group_name, student.transform, dtype
        )
        teacher_rows = StackedRows(teacher, [teacher_hidden, teacher_text_hidden])
        if steering.needs_vds_first and any(needs):
            # KL(q_I || q_x) of every token: a pair of the teacher's rows, values only.
            pair = LinearSource([teacher_rows], (teacher.transform, teacher.transform), workspace_bytes, shard)
            steering.vds = Statistics(sweep(pair, rows)[0]).standard.to(dtype)
            steering.find_limits()
            del pair  # frees the slabs

        need_hidden, need_text, need_weight, need_bias = needs
        d_hidden, d_text, d_bias = _empty_gradients(
            [need_hidden, need_text, need_bias], [hidden, text_hidden, bias], dtype
        )
        d_weight = _head_gradient(need_weight, weight, shard.columns, len(hidden), dtype)
        need_head = need_weight or need_bias
        head_gradients = (_wanted(d_weight[: shard.columns], need_weight), _wanted(d_bias[: shard.columns], need_bias))

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
            views.append(GradientView(hidden, _wanted(d_hidden, need_hidden)))
        if prior or at_once:
            alpha = 1.0 if prior else lam
            views.append(GradientView(text_hidden, _wanted(d_text, need_text), alpha, compact=compact))
        source = LinearSource(
            [StackedRows(student, [hidden, text_hidden]), teacher_rows], transforms, workspace_bytes, shard, views
        )
        coefficients = functools.partial(
            steering.coefficients, live_prior=prior, language=(lam if prior else 1.0) if at_once else 0.0
        )
        sink = LinearSink(views, student.weight, *head_gradients, source.plan) if views else None
        state, target_logits = sweep(source, rows, None, coefficients, sink, target_ids)
        loss, terms = steering.finish(state, target_logits)
        if at_once and not gate_known:
            d_text.masked_fill_(~steering.gate.unsqueeze(1), 0)

        # Phase 2: language preservation, the pair (a, w) of the gated tokens. Their statistics are taken again: in a
        # GEMM of another shape the logits are rounded otherwise, and p * (gap - mean_gap) would no longer cancel.
        if language and not at_once:
            del source, sink  # frees the slabs
            gated = steering.gated_tokens()
            view = GradientView(text_hidden, _wanted(d_text, need_text), lam, gated)
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
            sweep(source, rows, None, lambda at, x: _pair_coefficients(x, weights[at], gain), sink)
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
    tile_rows = max(len(logits), 1) if backend == "triton" else _DENSE_ROWS
    with guard(logits.device):
        steering = Steering(objective, token_weights, vds, vds_threshold, trajectory_ids, group_name, transform, dtype)
        four = [logits, teacher_logits, text_logits, teacher_text_logits]
        source = DenseSource(four, (transform, transform), vocab, tile_rows)
        state, target_logits = sweep(source, rows, target_ids=target_ids)
        loss, terms = steering.finish(state, target_logits)

        need_student, need_text = needs
        prior = not detach_prior and gamma > 0 and need_text
        language = lam if need_text else 0.0
        d_student = _logit_gradient(need_student, logits, vocab, written=True)
        d_text = _logit_gradient(need_text, text_logits, vocab, written=prior or language > 0)
        if need_student or prior or language:
            # The two come from one sweep: the student's gradient is formed even where only the other is wanted.
            d_view = d_student if need_student else logits.new_empty(logits.shape)
            sink = DenseSink(d_view, d_text if prior or language else None)
            coefficients = functools.partial(steering.coefficients, live_prior=prior, language=language)
            sweep(source, rows, state, coefficients, sink)
    return loss, terms, steering.unit, d_student, d_text


def _linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target_hiddens: list[Tensor],
    target_weights: list[Tensor],
    target_biases: list[Tensor | None],
    token_weights: Tensor,
    target_ids: Tensor | None,
    coefficients: list[float],
    temperature: float,
    vocab: int | None,
    vocab_group: str | None,
    scales: list[float],
    softcaps: list[float],
    workspace_bytes: int,
    backend: str,
    compute_dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias = _cast(compute_dtype, [hidden, weight, bias])
    target_hiddens, target_weights, target_biases = (
        _cast(compute_dtype, x) for x in (target_hiddens, target_weights, target_biases)
    )
    shard = VocabularyShard.of(vocab_group, [weight, *target_weights], vocab, target_ids)
    student, *targets = (
        _head(w, b, shard.columns, scale, softcap, temperature)
        for w, b, scale, softcap in zip(
            [weight, *target_weights], [bias, *target_biases], scales, softcaps, strict=True
        )
    )
    rows = row_backend(backend)
    dtype = accumulation_dtype(hidden)
    with guard(hidden.device):
        weights, unit = unit_weights(token_weights, dtype)
        need_hidden, need_weight, need_bias = needs
        d_hidden, d_bias = _empty_gradients([need_hidden, need_bias], [hidden, bias], dtype)
        d_weight = _head_gradient(need_weight, weight, shard.columns, len(hidden), dtype)
        views = [GradientView(hidden, _wanted(d_hidden, need_hidden))] if any(needs) else []
        target = ComposedRow(list(zip(coefficients, target_hiddens, targets, strict=True)))
        source = LinearSource(
            [StackedRows(student, [hidden]), target],
            (student.transform, LogitTransform(inv_temperature=1.0 / temperature)),
            workspace_bytes,
            shard,
            views,
        )
        head_gradients = (_wanted(d_weight[: shard.columns], need_weight), _wanted(d_bias[: shard.columns], need_bias))
        sink = LinearSink(views, student.weight, *head_gradients, source.plan) if views else None
        gain = student.transform.gain
        state, target_logits = sweep(
            source, rows, None, lambda at, x: _pair_coefficients(x, weights[at], gain), sink, target_ids
        )
        shard.sum(d_hidden)
        x = Statistics(state)
        loss = scaled(weights * unit, x.standard).sum().to(dtype)
        terms = [x.standard, x.entropy]
        if target_logits is not None:
            terms.append(x.log_probability(target_logits))
        terms = torch.stack([term.to(dtype) for term in terms])
    return loss, terms, unit, d_hidden, d_weight, d_bias


def _multiply(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once; in place where nobody needs the gradient again.

    The factor is of shape [1]: one without dimensions would be rounded to a 16-bit gradient's dtype first.
    """
    last = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
    out = gradient if last and gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def _register(name: str, implementation, differentiable: tuple[str, ...], n_terms: int):
    """Register an operator whose outputs are (loss, terms, unit, one gradient for each differentiable argument)."""
    operator = torch.library.custom_op(f"vgs_kernels::{name}", implementation, mutates_args=())
    names = [argument.name for argument in operator._opoverload._schema.arguments]
    positions = [names.index(argument) for argument in differentiable]

    @operator.register_fake
    def _(*arguments):
        first = arguments[0]
        values = dict(zip(names, arguments, strict=True))
        dtype = accumulation_dtype(first)
        count = n_terms + (values["target_ids"] is not None)
        outputs = [first.new_empty((), dtype=dtype), first.new_empty((count, first.shape[0]), dtype=dtype)]
        outputs.append(first.new_empty((), dtype=dtype))
        gradient_type = first.dtype if name.startswith("dense") else dtype
        for need, position in zip(values["needs"], positions, strict=True):
            shape = arguments[position].shape if need else (0,)
            outputs.append(first.new_empty(shape, dtype=gradient_type))
        return tuple(outputs)

    def setup_context(ctx, inputs, output):
        # The gradient of a list of tensors is a list; that of any other argument without gradient is None.
        ctx.no_gradients = [
            [None] * len(x) if isinstance(x, (list, tuple)) and all(isinstance(y, Tensor) for y in x) else None
            for x in inputs
        ]
        ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in positions]
        ctx.needs = inputs[names.index("needs")]
        ctx.set_materialize_grads(False)  # the other outputs' gradients would be zeros of their size
        ctx.save_for_backward(*output[2:])

    def backward(ctx, d_loss, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"vgs_kernels.{name} is differentiable once: its gradients are computed in the forward. "
                "Call backward without create_graph=True."
            )
        # Detached: saved outputs are part of the graph, and what is scaled in place would stay so.
        unit, *gradients = (x.detach() for x in ctx.saved_tensors)
        result = list(ctx.no_gradients)
        if d_loss is None:
            return tuple(result)
        for position, need, dtype, gradient in zip(positions, ctx.needs, ctx.dtypes, gradients, strict=True):
            if need:
                result[position] = _multiply(gradient, (d_loss * unit).reshape(1), dtype)
        return tuple(result)

    operator.register_autograd(backward, setup_context=setup_context)
    return operator


linear_vgs = _register("linear_vgs", _linear_vgs, ("hidden", "text_hidden", "weight", "bias"), len(VGS_TERMS))
dense_vgs = _register("dense_vgs", _dense_vgs, ("logits", "text_logits"), len(VGS_TERMS))
linear_divergence = _register(
    "linear_divergence", _linear_divergence, ("hidden", "weight", "bias"), len(DIVERGENCE_TERMS)
)
