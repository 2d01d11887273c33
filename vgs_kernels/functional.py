"""The public functions. Rows are tokens: pass response positions only, padding removed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import arguments, checks, ops
from .arguments import DEFAULT_WORKSPACE_BYTES
from .divergence import Divergence
from .linear_divergence import TargetRow, linear_divergence
from .objective import VGSObjective
from .parallel import group_name
from .policy import PolicyTerm
from .rows import accumulation_dtype


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
        policy: [N] values of the policy term, before its weights.
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
    policy: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Loss and unweighted means over this call's tokens (0 for no token), as detached 0-d tensors."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in ("loss", "target_logps")]
        terms = {name: getattr(self, name) for name in names}
        means = {name: x.float().sum() / max(len(x), 1) for name, x in terms.items() if x is not None}
        return {"loss": self.loss.detach(), **means}


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
    policy: PolicyTerm | None = None,
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
        policy: a clipped policy gradient on ``target_ids``, added to the loss, from the same sweep.
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
            ``target_ids``; folded 7 and 8), 7 more for each token that is projected again (those gated; adaptive: all),
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
    held_policy = arguments.policy_term(policy, target_ids, student_hidden)
    backend = checks.backend(backend, student_hidden)
    workspace_bytes = checks.workspace(workspace_bytes)

    foldable = objective.lam == 0 and objective.schedule == "constant" and objective.detach_prior
    if not return_terms and foldable and student_softcap is None and teacher_softcap is None:
        teacher = TargetRow(1.0, teacher_hidden, teacher_weight, teacher_bias, scales[1])
        prior = TargetRow(objective.kappa, student_text_hidden, student_weight, student_bias, scales[0])
        text = teacher._replace(coefficient=-objective.kappa, hidden=teacher_text_hidden)
        output = linear_divergence(
            TargetRow(1.0, student_hidden, student_weight, student_bias, scales[0]),
            [teacher, prior, text] if objective.kappa else [teacher],
            Divergence(temperature=objective.temperature),
            token_weights * (objective.eta * (1 + objective.gamma)),
            None,
            target_ids,
            held_policy,
            vocab,
            vocab_group,
            workspace_bytes,
            backend,
            fold=True,
        )
        return VGSOutput(output.loss, entropy=output.entropy, target_logps=output.target_logps, policy=output.policy)

    loss, terms, *_ = ops.linear_vgs(
        student_hidden, student_text_hidden, student_weight, student_bias,
        teacher_hidden.detach(), teacher_text_hidden.detach(), teacher_weight.detach(),
        arguments.detached(teacher_bias), token_weights, target_ids, *steering, *held_policy, *_knobs(objective), vocab,
        arguments.group(vocab_group), scales,
        [student_softcap or 0.0, teacher_softcap or 0.0], workspace_bytes, backend,
        checks.compute_dtype(student_hidden),
        arguments.needs(student_hidden, student_text_hidden, student_weight, student_bias),
    )  # fmt: skip
    return _output(loss, terms, target_ids)


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
    policy: PolicyTerm | None = None,
    vocab_size: int | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    backend: str = "auto",
) -> VGSOutput:
    """The VGS loss of logits that the caller holds, for trainers that have formed them already.

    Only the gradients of the student's logits are allocated; the backward scales them in place, or copies of them if
    the graph is kept. Scales and soft-caps are the caller's; the temperature is the objective's.

    Args:
        student_logits, student_text_logits, teacher_logits, teacher_text_logits: [N, V] of one dtype.
        objective, token_weights, target_ids, vds, vds_threshold, trajectory_ids, policy, vocab_size, process_group,
            backend: as in :func:`fused_linear_vgs_loss`.

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
        token_weights, target_ids, *steering, *arguments.policy_term(policy, target_ids, student_logits),
        *_knobs(objective), vocab,
        checks.backend(backend, student_logits), arguments.needs(student_logits, student_text_logits),
    )  # fmt: skip
    return _output(loss, terms, target_ids)


def _objective(objective: VGSObjective | None) -> VGSObjective:
    if objective is None:
        return VGSObjective()
    if not isinstance(objective, VGSObjective):
        raise TypeError(f"objective must be a VGSObjective or None, got {type(objective).__name__}.")
    return objective


def _knobs(objective: VGSObjective) -> list:
    """The objective as an operator takes it: in the order of its fields, without the divergence."""
    return [getattr(objective, field.name) for field in dataclasses.fields(objective)][:-1]


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
    return arguments.token_weights(token_weights, like), arguments.target_ids(target_ids, like, vocab), steering


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


def _output(loss: Tensor, terms: Tensor, target_ids: Tensor | None) -> VGSOutput:
    names = [*ops.VGS_TERMS, *([] if target_ids is None else ["target_logps"]), "policy"]
    values = dict(zip(names, terms.detach(), strict=False))
    return VGSOutput(loss, **{**values, "gate": values["gate"] > 0})
