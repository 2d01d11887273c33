"""The public functions. Rows are tokens: pass response positions only, padding removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .objective import DIVERGENCES, VGSObjective
from .parallel import group_name
from .rows import accumulation_dtype

DEFAULT_WORKSPACE_BYTES = 5 * 2**28


@dataclass
class VGSOutput:
    """Loss and detached per-token terms of one call (names as in :class:`VGSObjective`; nats).

    Attributes:
        loss: 0-d, carries gradient.
        standard, visual, language, vds: [N] divergences; None if the call did not form them.
        gate: [N] bool, whether language is preserved on the token.
        entropy: [N] entropy of p_I.
        student_vds: [N] KL(p_I || p_x), the student's own visual dependency: near 0, the student does not look.
        target_logps: [N] log p_I of ``target_ids``.
    """

    loss: Tensor
    standard: Tensor | None = None
    visual: Tensor | None = None
    language: Tensor | None = None
    vds: Tensor | None = None
    gate: Tensor | None = None
    entropy: Tensor | None = None
    student_vds: Tensor | None = None
    target_logps: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Loss and unweighted means over this call's tokens (0 for no token), as detached 0-d tensors."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("loss", "target_logps")]
        terms = {name: getattr(self, name) for name in names}
        means = {name: x.float().sum() / max(len(x), 1) for name, x in terms.items() if x is not None}
        return {"loss": self.loss.detach(), **means}


@dataclass
class DivergenceOutput:
    """Loss (0-d, carries gradient) and detached [N] tensors: divergence and entropy in nats, target_logps."""

    loss: Tensor
    divergence: Tensor
    entropy: Tensor
    target_logps: Tensor | None = None


class TargetRow(NamedTuple):
    """One addend of a composed target: coefficient * (softcap(logit_scale * (hidden @ weight^T + bias)))."""

    coefficient: float
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def fused_linear_vgs_loss(
    student_hidden: Tensor,
    student_text_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_text_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    objective: VGSObjective | None = None,
    token_weights: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target_ids: Tensor | None = None,
    vds: Tensor | None = None,
    vds_threshold: float | Tensor | Sequence[float] | None = None,
    trajectory_ids: Tensor | None = None,
    vocab_size: int | None = None,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    return_terms: bool = True,
    backend: str = "auto",
) -> VGSOutput:
    """The VGS loss (arXiv 2606.00564, Eq. 3-18, 24-25) from hidden states; no [N, V] tensor is formed.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight^T + bias) / softcap) / temperature``, in float32 whatever
    the dtype of the inputs. Gradients reach the student's hidden states, weight and bias, each only if it requires
    grad; they are computed in the forward, so that a frozen input costs nothing. All inputs share one floating dtype;
    autocast casts copies, as for a linear layer, and gradients keep the dtype of the inputs. float64 runs on the
    PyTorch backend; products of float32 inputs follow ``torch.set_float32_matmul_precision``. A -inf logit (through a
    bias) masks its column.

    Args:
        student_hidden, student_text_hidden: [N, Ds] states at response positions, with and without the image.
        student_weight: [V, Ds].
        teacher_hidden, teacher_text_hidden: [N, Dt].
        teacher_weight: [V, Dt].
        objective: None means ``VGSObjective()``.
        token_weights: [N] weights of the tokens' losses, without gradient; None means 1/N each. In float16, weights far
            below the largest lose gradient precision.
        student_bias, teacher_bias: [V].
        target_ids: [N] int64 sampled tokens, for ``target_logps``.
        vds: [N] visual dependency scores known beforehand; they replace those computed here.
        vds_threshold: gate threshold known beforehand, a number or 0-d tensor; a pair (low, high) for the adaptive
            schedule.
        trajectory_ids: [N] int64, needed by ``vds_scope="trajectory"``.
        vocab_size: number of leading columns of both heads to use; names the rest as padding. With ``vocab_group``, of
            the whole vocabulary.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: see the formula.
        process_group: data-parallel ranks of ``vds_scope="ranks"``; None means all. Every rank must call, also one
            without tokens.
        vocab_group: ranks that share the vocabulary: each passes its own columns of both heads (weights and biases;
            any number, in the order of the ranks) and otherwise the same arguments, requiring the same gradients. All
            get the loss and terms of the whole vocabulary, the whole gradient of the hidden states, which is not to be
            summed again, and that of their own columns. ``target_ids`` and ``vocab_size`` count through the ranks;
            padding may fill whole shards. ``vds_scope="ranks"`` then needs a ``process_group`` of its own, one rank of
            each vocabulary group. A rank sends, in one MAX and one SUM for each tile, 16 float32 for a token (17 with
            ``target_ids``; folded 6 and 7), 6 more for each token that is projected again (those gated; adaptive: all),
            and at the end one [N, Ds] float32 for each gradient of hidden states. The host waits once, for the number
            of each rank's columns.
        workspace_bytes: bound on the scratch memory beside gradients, [N] vectors and the hidden states of one tile or
            gradient block, whatever N is. Heads are read once for each tile that fits: at the default, 256 tokens of a
            vocabulary of 152k. Below some 170 MiB that vocabulary is cut, and everything is projected twice;
            ``python -m benchmarks counts`` says what a workspace costs.
        return_terms: with False, where lam = 0, gamma is constant, the prior detached and no soft-cap is used, the
            teacher's two projections become one (its hidden states are combined and rounded to their dtype); the loss
            is then (1 + gamma) * eta * KL(p_I || q~), see :attr:`VGSObjective.kappa`: the same gradient, another
            constant. Terms that are not formed are None.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        :class:`VGSOutput`; zero tokens give a loss of 0 that is connected to every input that takes part and requires
        grad (the folded form takes no gradient to ``student_text_hidden``).

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    objective = _objective(objective)
    checks.tensor("student_hidden", student_hidden, (None, None))
    n = len(student_hidden)
    checks.tensor("student_text_hidden", student_text_hidden, tuple(student_hidden.shape), like=student_hidden)
    checks.tensor("teacher_hidden", teacher_hidden, (n, None), like=student_hidden)
    checks.tensor("teacher_text_hidden", teacher_text_hidden, tuple(teacher_hidden.shape), like=student_hidden)
    checks.process_group("vocab_group", vocab_group)
    shard = vocab_group is not None
    checks.head("student_weight", student_weight, "student_bias", student_bias, student_hidden, shard=shard)
    checks.head("teacher_weight", teacher_weight, "teacher_bias", teacher_bias, teacher_hidden, shard=shard)
    vocab = checks.vocabulary(
        {"student_weight": len(student_weight), "teacher_weight": len(teacher_weight)}, vocab_size, shard=shard
    )
    if shard and process_group is None and objective.vds_scope == "ranks" and vds_threshold is None:
        raise ValueError("process_group must be given for vds_scope='ranks' with a vocab_group, got None.")
    for name, value in (("student_softcap", student_softcap), ("teacher_softcap", teacher_softcap)):
        checks.number(name, value, positive=True, optional=True)
    scales = [
        checks.number("student_logit_scale", student_logit_scale, positive=True),
        checks.number("teacher_logit_scale", teacher_logit_scale, positive=True),
    ]
    token_weights, target_ids, steering = _token_arguments(
        objective, student_hidden, token_weights, target_ids, vocab, vds, vds_threshold, trajectory_ids, process_group
    )
    backend = checks.backend(backend, student_hidden)
    workspace_bytes = checks.workspace(workspace_bytes)

    foldable = objective.lam == 0 and objective.schedule == "constant" and objective.detach_prior
    if not return_terms and foldable and student_softcap is None and teacher_softcap is None:
        target = _composed_target(
            objective.kappa,
            TargetRow(1.0, teacher_hidden, teacher_weight, teacher_bias, scales[1]),
            teacher_text_hidden,
            TargetRow(objective.kappa, student_text_hidden, student_weight, student_bias, scales[0]),
        )
        loss, terms = _divergence(
            TargetRow(1.0, student_hidden, student_weight, student_bias, scales[0]), target,
            token_weights * (objective.eta * (1 + objective.gamma)), target_ids, objective.temperature, vocab,
            vocab_group, workspace_bytes, backend,
        )  # fmt: skip
        return VGSOutput(loss, entropy=terms[1], target_logps=terms[2] if len(terms) > 2 else None)

    loss, terms, *_ = ops.linear_vgs(
        student_hidden, student_text_hidden, student_weight, student_bias,
        teacher_hidden.detach(), teacher_text_hidden.detach(), teacher_weight.detach(), _detached(teacher_bias),
        token_weights, target_ids, *steering, *_knobs(objective), vocab, _group(vocab_group), scales,
        [student_softcap or 0.0, teacher_softcap or 0.0], workspace_bytes, backend,
        checks.compute_dtype(student_hidden), _needs(student_hidden, student_text_hidden, student_weight, student_bias),
    )  # fmt: skip
    return _output(loss, terms)


def vgs_loss(
    student_logits: Tensor,
    student_text_logits: Tensor,
    teacher_logits: Tensor,
    teacher_text_logits: Tensor,
    *,
    objective: VGSObjective | None = None,
    token_weights: Tensor | None = None,
    target_ids: Tensor | None = None,
    vds: Tensor | None = None,
    vds_threshold: float | Tensor | Sequence[float] | None = None,
    trajectory_ids: Tensor | None = None,
    vocab_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> VGSOutput:
    """The VGS loss of logits that the caller holds, for trainers that have formed them already.

    Only the gradients of the student's logits are allocated; the backward scales them in place, or copies of them if
    the graph is kept. Scales and soft-caps are the caller's; the temperature is the objective's.

    Args:
        student_logits, student_text_logits, teacher_logits, teacher_text_logits: [N, V] of one dtype.
        objective, token_weights, target_ids, vds, vds_threshold, trajectory_ids, vocab_size, process_group, backend:
            as in :func:`fused_linear_vgs_loss`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    objective = _objective(objective)
    checks.tensor("student_logits", student_logits, (None, None))
    n, columns = student_logits.shape
    others = {
        "student_text_logits": student_text_logits,
        "teacher_logits": teacher_logits,
        "teacher_text_logits": teacher_text_logits,
    }
    for name, value in others.items():
        checks.tensor(name, value, (n, None if vocab_size is not None else columns), like=student_logits)
    sizes = {name: value.shape[1] for name, value in {"student_logits": student_logits, **others}.items()}
    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"{name} must have at least one column, got shape {(n, 0)}.")
    vocab = checks.vocabulary(sizes, vocab_size)
    token_weights, target_ids, steering = _token_arguments(
        objective, student_logits, token_weights, target_ids, vocab, vds, vds_threshold, trajectory_ids, process_group
    )
    loss, terms, *_ = ops.dense_vgs(
        student_logits, student_text_logits, teacher_logits.detach(), teacher_text_logits.detach(),
        token_weights, target_ids, *steering, *_knobs(objective), vocab,
        checks.backend(backend, student_logits), _needs(student_logits, student_text_logits),
    )  # fmt: skip
    return _output(loss, terms)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Sequence[TargetRow | tuple],
    *,
    divergence: str = "reverse_kl",
    token_weights: Tensor | None = None,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    target_ids: Tensor | None = None,
    vocab_size: int | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
) -> DivergenceOutput:
    """KL(softmax(student logits) || softmax(sum_k c_k * logits_k)) from hidden states; no [N, V] tensor is formed.

    One operation for plain distillation (one row with coefficient 1), VGS with its terms merged (see
    :attr:`VGSObjective.kappa`) and contrastive targets. The target receives no gradient.

    Args:
        student_hidden: [N, D].
        student_weight: [V, D].
        target: rows (coefficient, hidden [N, Dk], weight [V, Dk][, bias [V]]) or :class:`TargetRow`.
        divergence: ``"reverse_kl"``.
        temperature: divides the student's logits and the composed ones, > 0.
        token_weights, student_bias, student_softcap, student_logit_scale, target_ids, vocab_size, vocab_group,
            workspace_bytes, backend: as in :func:`fused_linear_vgs_loss`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}.")
    if isinstance(target, (str, Tensor)) or not isinstance(target, Sequence) or not target:
        raise ValueError(f"target must be a non-empty sequence of rows, got {type(target).__name__}.")
    rows = [_target_row(f"target[{i}]", row) for i, row in enumerate(target)]
    checks.process_group("vocab_group", vocab_group)
    shard = vocab_group is not None
    checks.tensor("student_hidden", student_hidden, (None, None))
    checks.head("student_weight", student_weight, "student_bias", student_bias, student_hidden, shard=shard)
    heads = {"student_weight": len(student_weight)}
    for i, row in enumerate(rows):
        hidden, weight, bias = row.hidden, row.weight, row.bias
        name = f"target[{i}]"
        checks.number(f"{name}.coefficient", row.coefficient)
        checks.tensor(f"{name}.hidden", hidden, (len(student_hidden), None), like=student_hidden)
        checks.head(f"{name}.weight", weight, f"{name}.bias", bias, hidden, shard=shard)
        checks.number(f"{name}.softcap", row.softcap, positive=True, optional=True)
        checks.number(f"{name}.logit_scale", row.logit_scale, positive=True)
        heads[f"{name}.weight"] = len(weight)
    student = TargetRow(1.0, student_hidden, student_weight, student_bias, student_logit_scale, student_softcap)
    vocab = checks.vocabulary(heads, vocab_size, shard=shard)
    checks.number("temperature", temperature, positive=True)
    checks.number("student_softcap", student_softcap, positive=True, optional=True)
    checks.number("student_logit_scale", student_logit_scale, positive=True)
    target_ids = _target_ids(target_ids, student_hidden, vocab)
    loss, terms = _divergence(
        student, rows, _weights(token_weights, student_hidden), target_ids, temperature, vocab, vocab_group,
        checks.workspace(workspace_bytes), checks.backend(backend, student_hidden),
    )  # fmt: skip
    return DivergenceOutput(loss, *terms)


def _divergence(
    student: TargetRow,
    target: Sequence[TargetRow],
    token_weights: Tensor,
    target_ids: Tensor | None,
    temperature: float,
    vocab: int | None,
    vocab_group: torch.distributed.ProcessGroup | None,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss and detached terms of a validated student row against a composed target."""
    loss, terms, *_ = ops.linear_divergence(
        student.hidden, student.weight, student.bias,
        [row.hidden.detach() for row in target], [row.weight.detach() for row in target],
        [_detached(row.bias) for row in target], token_weights, target_ids,
        [float(row.coefficient) for row in target], float(temperature), vocab, _group(vocab_group),
        [float(row.logit_scale) for row in (student, *target)], [row.softcap or 0.0 for row in (student, *target)],
        workspace_bytes, backend, checks.compute_dtype(student.hidden),
        _needs(student.hidden, student.weight, student.bias),
    )  # fmt: skip
    return loss, terms.detach()


def _target_row(name: str, row: TargetRow | Sequence) -> TargetRow:
    if isinstance(row, TargetRow):
        return row
    if not isinstance(row, (tuple, list)) or not 3 <= len(row) <= 6:
        came = f"{len(row)} entries" if isinstance(row, (tuple, list)) else type(row).__name__
        raise TypeError(f"{name} must be a TargetRow or (coefficient, hidden, weight[, bias]), got {came}.")
    return TargetRow(*row)


def _objective(objective: VGSObjective | None) -> VGSObjective:
    if objective is None:
        return VGSObjective()
    if not isinstance(objective, VGSObjective):
        raise TypeError(f"objective must be a VGSObjective or None, got {type(objective).__name__}.")
    return objective


def _knobs(objective: VGSObjective) -> list:
    """The objective as an operator takes it: in the order of its fields, without the divergence."""
    return [getattr(objective, field.name) for field in dataclasses.fields(objective)][:-1]


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _needs(*tensors: Tensor | None) -> list[bool]:
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in tensors]


def _group(vocab_group: torch.distributed.ProcessGroup | None) -> str | None:
    return None if vocab_group is None else group_name(vocab_group)


def _weights(token_weights: Tensor | None, like: Tensor) -> Tensor:
    n = len(like)
    dtype = accumulation_dtype(like)
    if token_weights is None:
        return torch.full((n,), 1.0 / max(n, 1), dtype=dtype, device=like.device)
    return checks.per_token("token_weights", token_weights, like).to(dtype)


def _target_ids(target_ids: Tensor | None, like: Tensor, vocab: int | None) -> Tensor | None:
    target_ids = checks.per_token("target_ids", target_ids, like, integer=True)
    checks.ids_in_vocabulary("target_ids", target_ids, vocab)
    return target_ids


def _token_arguments(
    objective: VGSObjective,
    like: Tensor,
    token_weights: Tensor | None,
    target_ids: Tensor | None,
    vocab: int | None,
    vds: Tensor | None,
    vds_threshold: float | Tensor | Sequence[float] | None,
    trajectory_ids: Tensor | None,
    process_group: torch.distributed.ProcessGroup | None,
) -> tuple[Tensor, Tensor | None, list]:
    """Validated (token_weights, target_ids, [vds, vds_threshold, trajectory_ids, group name])."""
    trajectory_ids = checks.per_token("trajectory_ids", trajectory_ids, like, integer=True)
    if objective.vds_scope == "trajectory" and trajectory_ids is None and vds_threshold is None:
        raise ValueError("trajectory_ids must be given for vds_scope='trajectory', got None.")
    steering = [
        checks.per_token("vds", vds, like),
        _threshold(vds_threshold, objective, like),
        trajectory_ids,
        group_name(process_group) if objective.vds_scope == "ranks" else None,
    ]
    return _weights(token_weights, like), _target_ids(target_ids, like, vocab), steering


def _threshold(value: float | Tensor | Sequence[float] | None, objective: VGSObjective, like: Tensor) -> Tensor | None:
    """[K] tensor with one limit for each of the objective's quantiles."""
    if value is None:
        return None
    dtype = accumulation_dtype(like)
    if isinstance(value, Sequence) and any(isinstance(x, Tensor) for x in value):
        value = torch.stack([torch.as_tensor(x, dtype=dtype, device=like.device).reshape(()) for x in value])
    if isinstance(value, Tensor):
        limits = value.detach().to(device=like.device, dtype=dtype).reshape(-1)
    else:
        values = list(value) if isinstance(value, Sequence) else [value]
        values = [checks.number("vds_threshold", x) for x in values]
        if values != sorted(values):
            raise ValueError(f"vds_threshold must be a pair (low, high) with low <= high, got {tuple(values)}.")
        limits = torch.tensor(values, dtype=dtype).to(like.device, non_blocking=True)
    wanted = len(objective.quantiles)
    if len(limits) != wanted:
        kind = "a pair (low, high)" if wanted == 2 else "one number"
        raise ValueError(f"vds_threshold must be {kind} for schedule={objective.schedule!r}, got {len(limits)} values.")
    return limits


def _composed_target(
    kappa: float, teacher: TargetRow, teacher_text_hidden: Tensor, prior: TargetRow
) -> list[TargetRow]:
    """Rows of t + kappa * (a - w), the teacher's two folded into one by linearity: one GEMM instead of two."""
    if kappa == 0:
        return [teacher]
    wide = accumulation_dtype(teacher.hidden)
    folded = torch.sub(teacher.hidden.to(wide), teacher_text_hidden.to(wide), alpha=kappa).to(teacher.hidden.dtype)
    bias = None if teacher.bias is None else teacher.bias * (1 - kappa)
    return [teacher._replace(hidden=folded, bias=bias), prior]


def _output(loss: Tensor, terms: Tensor) -> VGSOutput:
    names = (*ops.VGS_TERMS, "target_logps")
    values = dict(zip(names, terms.detach(), strict=False))
    return VGSOutput(loss, **{**values, "gate": values["gate"] > 0})
