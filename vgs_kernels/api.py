"""The public functions. Rows are tokens: best pass response positions only, padding removed.

They check, flatten and name their arguments, and hand them to the one operator layer (operators.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, lowering
from .divergence import Divergence
from .heads import Head, TargetRow
from .objective import VGSObjective
from .outputs import DivergenceOutput, VGSOutput
from .policy import PolicyTerm
from .tokens import Tokens

DEFAULT_WORKSPACE_BYTES = 5 * 2**28


def fused_linear_vgs_loss(
    student_hidden: Tensor,
    student_text_hidden: Tensor,
    student_weight: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_text_hidden: Tensor,
    teacher_weight: Tensor | Head,
    *,
    objective: VGSObjective | None = None,
    token_weights: Tensor | None = None,
    reduction: str | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    target_ids: Tensor | None = None,
    ignore_index: int = -100,
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
    the dtypes of the inputs, which may differ; 16-bit products need states and head of one dtype. Gradients reach the
    student's hidden states, weight and bias, each only if it requires grad; they are computed in the forward, so that a
    frozen input costs nothing. Autocast casts copies, as for a linear layer, and gradients keep the dtype of the
    inputs. float64 runs on the PyTorch backend; products of float32 inputs follow
    ``torch.set_float32_matmul_precision``. A -inf logit (through a bias) masks its column.

    Args:
        student_hidden, student_text_hidden: [..., Ds] states at response positions, with and without the image. All
            leading dimensions together are the N tokens.
        student_weight: [V, Ds], or a :class:`Head`.
        teacher_hidden, teacher_text_hidden: [..., Dt].
        teacher_weight: [V, Dt], or a :class:`Head`.
        objective: None means ``VGSObjective()``.
        token_weights: [...] weights of the tokens' losses, without gradient. A token of weight 0 takes part in nothing:
            it enters no quantile and no gradient, whatever its states hold. In float16, weights far below the largest
            lose gradient precision.
        reduction: ``"sum"``, ``"mean"`` (divided by the sum of the weights) or ``"none"`` of weights * losses, where
            weights that are not given are 1. None: the sum with weights that are given, else the mean. With ``"none"``
            the backward projects once more.
        student_bias, teacher_bias: [V], of bare weights.
        target_ids: [...] int64 sampled tokens, for ``target_logps``.
        ignore_index: tokens with this target id are ignored, as if of weight 0; all their terms are 0.
        vds: [...] visual dependency scores known beforehand; they replace those computed here.
        vds_threshold: gate threshold known beforehand, a number or 0-d tensor; a pair (low, high) for the adaptive
            schedule.
        trajectory_ids: [...] int64, needed by ``vds_scope="trajectory"``.
        policy: a clipped policy gradient on ``target_ids``, added to the loss, from the same sweep.
        vocab_size: number of leading columns of both heads to use; names the rest as padding. With ``vocab_group``, of
            the whole vocabulary.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: see the formula; of bare weights.
        process_group: data-parallel ranks of ``vds_scope="ranks"``; None means all. Every rank must call, also one
            without tokens.
        vocab_group: ranks that share the vocabulary: each passes its own columns of both heads (weights and biases;
            any number, in the order of the ranks) and otherwise the same arguments, requiring the same gradients. All
            get the loss and terms of the whole vocabulary, the whole gradient of the hidden states, which is not to be
            summed again, and that of their own columns. ``target_ids`` and ``vocab_size`` count through the ranks;
            padding may fill whole shards. ``vds_scope="ranks"`` then needs a ``process_group`` of its own, one rank of
            each vocabulary group. A rank sends, in one MAX and one SUM for each tile, 16 float32 for a token (17 with
            ``target_ids``; folded 9 and 10), 9 more for each token that is projected again (gated ones; adaptive: all),
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
    objective, first = lowering.objective(objective), student_hidden
    hidden = checks.states("student_hidden", first)
    text_hidden = checks.states("student_text_hidden", student_text_hidden, first, first.shape[-1])
    teacher_states = checks.states("teacher_hidden", teacher_hidden, first)
    teacher_text_states = checks.states("teacher_text_hidden", teacher_text_hidden, first, teacher_hidden.shape[-1])
    checks.process_group("vocab_group", vocab_group)
    shard = vocab_group is not None
    loose = {"bias": student_bias, "scale": student_logit_scale, "softcap": student_softcap}
    student = checks.head("student_weight", student_weight, first, shard=shard, **loose)
    loose = {"bias": teacher_bias, "scale": teacher_logit_scale, "softcap": teacher_softcap}
    teacher = checks.head("teacher_weight", teacher_weight, teacher_hidden, shard=shard, **loose)
    sizes = {"student_weight": len(student.weight), "teacher_weight": len(teacher.weight)}
    vocab = checks.vocabulary(sizes, vocab_size, shard=shard)
    if shard and process_group is None and objective.vds_scope == "ranks" and vds_threshold is None:
        raise ValueError("process_group must be given for vds_scope='ranks' with a vocab_group, got None.")
    tokens = Tokens(first, token_weights, target_ids, ignore_index, reduction, policy, vocab)
    steered = lowering.steered(first, objective, vds, vds_threshold, trajectory_ids)
    numbers = {"workspace_bytes": checks.workspace(workspace_bytes), "vocab_size": vocab}
    options = lowering.form(first, vocab_group)
    options["backend"] = checks.backend(backend, hidden, teacher_states, student.weight, teacher.weight)

    foldable = objective.lam == 0 and objective.schedule == "constant" and objective.detach_prior
    if not return_terms and foldable and student.softcap is None and teacher.softcap is None:
        rows = [TargetRow(1.0, teacher_states, teacher)]
        if objective.kappa:
            rows.append(TargetRow(objective.kappa, text_hidden, student))
            rows.append(TargetRow(-objective.kappa, teacher_text_states, teacher))
        tokens.scale(objective.eta * (1 + objective.gamma))
        knobs = Divergence(temperature=objective.temperature)
        out = lowering.linear_divergence(hidden, student, rows, True, numbers, knobs, tokens, **options)
        terms = {"entropy": out.entropy, "target_logps": out.target_logps, "policy": out.policy}
        return VGSOutput(out.loss, **terms, counted=tokens.counted_shaped)
    of_student, student_numbers = lowering.head("student", student)
    of_teacher, teacher_numbers = lowering.head("teacher", teacher)
    return lowering.vgs(
        "vgs",
        {"student_hidden": hidden, "student_text_hidden": text_hidden, **of_student},
        {"teacher_hidden": teacher_states, "teacher_text_hidden": teacher_text_states, **of_teacher, **steered},
        {**numbers, **student_numbers, **teacher_numbers},
        *(objective, tokens, process_group),
        **options,
    )


def vgs_loss(
    student_logits: Tensor,
    student_text_logits: Tensor,
    teacher_logits: Tensor,
    teacher_text_logits: Tensor,
    *,
    objective: VGSObjective | None = None,
    token_weights: Tensor | None = None,
    reduction: str | None = None,
    target_ids: Tensor | None = None,
    ignore_index: int = -100,
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
        student_logits, student_text_logits, teacher_logits, teacher_text_logits: [..., V].
        objective, token_weights, reduction, target_ids, ignore_index, vds, vds_threshold, trajectory_ids, policy,
            vocab_size, process_group, backend: as in :func:`fused_linear_vgs_loss`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    objective, first = lowering.objective(objective), student_logits
    columns = None if vocab_size is not None else first.shape[-1]
    student = {
        "student_logits": checks.states("student_logits", first),
        "student_text_logits": checks.states("student_text_logits", student_text_logits, first, columns),
    }
    teacher = {
        "teacher_logits": checks.states("teacher_logits", teacher_logits, first, columns),
        "teacher_text_logits": checks.states("teacher_text_logits", teacher_text_logits, first, columns),
    }
    vocab = checks.vocabulary(checks.columns(student | teacher), vocab_size)
    tokens = Tokens(first, token_weights, target_ids, ignore_index, reduction, policy, vocab)
    teacher |= lowering.steered(first, objective, vds, vds_threshold, trajectory_ids)
    name = checks.backend(backend, *student.values(), teacher_logits, teacher_text_logits)
    numbers = {"vocab_size": vocab}
    return lowering.vgs("vgs_logits", student, teacher, numbers, objective, tokens, process_group, backend=name)


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | Head,
    target: Sequence[TargetRow | tuple],
    *,
    divergence: str | Divergence = "reverse_kl",
    token_weights: Tensor | None = None,
    reduction: str | None = None,
    student_bias: Tensor | None = None,
    student_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    target_ids: Tensor | None = None,
    ignore_index: int = -100,
    policy: PolicyTerm | None = None,
    fold: bool = True,
    vocab_size: int | None = None,
    vocab_group: torch.distributed.ProcessGroup | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
    backend: str = "auto",
    **knobs: Any,
) -> DivergenceOutput:
    """D(softmax(student logits), softmax(sum_k c_k * logits_k)) from hidden states; no [N, V] tensor is formed.

    One operation for plain distillation (one row with coefficient 1), VGS with its terms merged (see
    :attr:`VGSObjective.kappa`), contrastive targets, and whatever :class:`Divergence` describes. The target receives no
    gradient, whose rows it may be: a teacher's, or those of the live, a frozen or an averaged student.

    Gradients are computed in the forward, so that a frozen input costs nothing.

    Args:
        student_hidden: [..., D].
        student_weight: [V, D], or a :class:`Head`.
        target: rows (coefficient, hidden [..., Dk], weight [V, Dk] or Head[, bias [V]]) or :class:`TargetRow`.
        divergence: a :class:`Divergence`, or the name of one, whose further settings are then **knobs. The JSD,
            ``clip`` and ``"student_top_k"`` read each tile of logits once more; a support masks logits and saves no
            product. Where the workspace cuts the vocabulary, each of these projects again.
        policy: a term that is added to the loss, on ``target_ids``. Not with ``"teacher_top_k"``, outside of which a
            sampled token has no probability, nor with ``reduction="none"``.
        fold: combine rows of the same head (one :class:`Head`, or the same weight and bias objects with one scale; no
            soft-cap) before they are projected, by linearity: one product instead of several. Their sum is rounded to
            the hidden states' dtype. In bfloat16 that makes a gradient error of 0.15 % one of 0.17 % (distant models)
            to 0.6 % (nearly equal ones).
        token_weights, reduction, student_bias, student_softcap, student_logit_scale, target_ids, ignore_index,
            vocab_size, vocab_group, workspace_bytes, backend: as in :func:`fused_linear_vgs_loss`.
        **knobs: ``beta``, ``support``, ``top_k``, ``plausibility``, ``clip``, ``token_clip``, ``temperature`` and
            ``temperature_squared`` of :class:`Divergence`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    knobs = lowering.divergence(divergence, knobs)
    checks.process_group("vocab_group", vocab_group)
    shard = vocab_group is not None
    hidden = checks.states("student_hidden", student_hidden)
    loose = {"bias": student_bias, "scale": student_logit_scale, "softcap": student_softcap}
    student = checks.head("student_weight", student_weight, student_hidden, shard=shard, **loose)
    given = enumerate(checks.sequence("target", target, "rows"))
    rows = [lowering.target_row(f"target[{i}]", row, student_hidden, shard) for i, row in given]
    sizes = {f"target[{i}].weight": len(row.weight.weight) for i, row in enumerate(rows)}
    vocab = checks.vocabulary({"student_weight": len(student.weight), **sizes}, vocab_size, shard=shard)
    tokens = Tokens(student_hidden, token_weights, target_ids, ignore_index, reduction, policy, vocab)
    numbers = {"workspace_bytes": checks.workspace(workspace_bytes), "vocab_size": vocab}
    options = lowering.form(student_hidden, vocab_group)
    used = [x for row in rows for x in (row.hidden, row.weight.weight)]
    options["backend"] = checks.backend(backend, hidden, student.weight, *used)
    return lowering.linear_divergence(hidden, student, rows, fold, numbers, knobs, tokens, **options)


def divergence_loss(
    student_logits: Tensor,
    target: Sequence[tuple[float | Tensor, Tensor]],
    *,
    divergence: str | Divergence = "reverse_kl",
    token_weights: Tensor | None = None,
    reduction: str | None = None,
    target_ids: Tensor | None = None,
    ignore_index: int = -100,
    policy: PolicyTerm | None = None,
    vocab_size: int | None = None,
    backend: str = "auto",
    **knobs: Any,
) -> DivergenceOutput:
    """The divergence of logits that the caller holds; scales and soft-caps are the caller's.

    Args:
        student_logits: [..., V].
        target: addends (coefficient, logits [..., V]).
        divergence, token_weights, reduction, target_ids, ignore_index, policy, vocab_size, backend, **knobs: as in
            :func:`fused_linear_divergence`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    knobs = lowering.divergence(divergence, knobs)
    student = {"student_logits": checks.states("student_logits", student_logits)}
    rows, named = [], dict(student)
    for i, addend in enumerate(checks.sequence("target", target, "addends")):
        if not isinstance(addend, (tuple, list)) or len(addend) != 2:
            raise TypeError(f"target[{i}] must be (coefficient, logits), got {type(addend).__name__}.")
        named[f"target[{i}].logits"] = checks.states(f"target[{i}].logits", addend[1], student_logits)
        rows.append(
            (lowering.coefficient(f"target[{i}].coefficient", addend[0], student_logits), [*named.values()][-1])
        )
    vocab = checks.vocabulary(checks.columns(named), vocab_size)
    tokens = Tokens(student_logits, token_weights, target_ids, ignore_index, reduction, policy, vocab)
    fixed, numbers = lowering.addends(rows, "logits")
    options = {"head_rows": len(rows), "backend": checks.backend(backend, *named.values())}
    numbers["vocab_size"] = vocab
    return lowering.divergence_of("divergence_logits", student, fixed, numbers, knobs, tokens, **options)
