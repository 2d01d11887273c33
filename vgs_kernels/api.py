"""The public functions. Rows are tokens: best pass response positions only, padding removed.

They check, flatten and name their arguments, and hand them to the one operator layer (operators.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, steering
from .divergence import Divergence
from .divergence_loss import TERMS
from .heads import Head, TargetRow, grouped
from .objective import VGSObjective
from .outputs import DivergenceOutput, VGSOutput, shares
from .parallel import group_name
from .policy import PolicyTerm
from .request import Request
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
    gradient_tolerance: float = 0.0,
    return_terms: bool = True,
    backend: str = "auto",
) -> VGSOutput:
    """The VGS loss (arXiv 2606.00564, Eq. 3-18, 24-25) from hidden states; no [N, V] tensor is formed.

    ``logits = softcap * tanh(logit_scale * (hidden @ weight^T + bias) / softcap) / temperature``, in float32 whatever
    the dtypes of the inputs, which may differ (float64 on the PyTorch backend); 16-bit products need states and head of
    one dtype, float32 ones follow ``torch.set_float32_matmul_precision``. A logit of -inf (a bias) masks its column.
    Gradients reach the student's states, weight and bias, in their dtypes and only where required; they are computed in
    the forward. Autocast casts copies, as for a linear layer.

    Args:
        student_hidden, student_text_hidden: [..., Ds] states at response positions, with and without the image. All
            leading dimensions together are the N tokens.
        student_weight: [V, Ds], or a :class:`Head`.
        teacher_hidden, teacher_text_hidden: [..., Dt].
        teacher_weight: [V, Dt], or a :class:`Head`.
        objective: None means ``VGSObjective()``.
        token_weights: [...] weights of the tokens' losses, without gradient. A token of weight 0 takes part in nothing,
            no quantile and no gradient, whatever its states hold.
        reduction: ``"sum"``, ``"mean"`` (divided by the sum of the weights) or ``"none"`` of weights * losses, where
            weights that are not given are 1. None: the sum with weights that are given, else the mean. With ``"none"``
            the backward projects once more.
        student_bias, teacher_bias: [V], of bare weights.
        target_ids: [...] int64 sampled tokens, for ``target_logps``.
        ignore_index: tokens with this target id are ignored, as if of weight 0; all their terms are 0.
        vds: [...] visual dependency scores known beforehand.
        vds_threshold: gate threshold known beforehand, a number or 0-d tensor; a pair (low, high) for the adaptive
            schedule.
        trajectory_ids: [...] int64, needed by ``vds_scope="trajectory"``.
        policy: a clipped policy gradient on ``target_ids``, added to the loss, from the same sweep.
        vocab_size: number of leading columns of both heads to use (with ``vocab_group``, of all ranks together); names
            the rest as padding.
        student_softcap, teacher_softcap, student_logit_scale, teacher_logit_scale: see the formula; of bare weights.
        process_group: data-parallel ranks of ``vds_scope="ranks"``; None means all. Every rank must call, also one
            without tokens.
        vocab_group: ranks that share the vocabulary: each passes its own columns of both heads (any number, in the
            order of the ranks) and otherwise the same arguments, requiring the same gradients. All get the loss, the
            terms, the whole gradient of the hidden states, not to be summed again, and that of their own columns.
            ``target_ids`` counts through the ranks. ``vds_scope="ranks"`` then needs a ``process_group`` of its own,
            one rank of each vocabulary group. For a token a rank sends 16 float32 (17 with ``target_ids``; folded 9 and
            10), 9 more if it is projected again (gated ones; adaptive: all), and Ds for each gradient of hidden states.
            The host waits once, for the number of each rank's columns.
        workspace_bytes: bound on the scratch memory beside gradients, [N] vectors and the hidden states of one tile or
            gradient block. Heads are read once for each tile that fits: at the default, 256 tokens of a vocabulary of
            152k. Below some 170 MiB that vocabulary is cut, and everything is projected twice.
        gradient_tolerance: share of the L1 norm of a token's logit gradient that may be left out of the products with
            the head and the hidden states, in [0, 1); 0: nothing is. On peaked rows all but a few per cent of the
            vocabulary is then skipped; where more than 60 % of it matters, all is multiplied. No token loses more in
            any view (see docs/performance.md), and a bias's gradient nothing. The output says what was lost. The host
            waits for the device; beside the workspace there are temporaries, of some 200 MiB on a GPU.
        return_terms: with False, where lam = 0, gamma is constant, the prior detached and no soft-cap is used, the
            teacher's two projections become one (its states are combined and rounded to their dtype). The loss is then
            (1 + gamma) * eta * KL(p_I || q~), see :attr:`VGSObjective.kappa`: the same gradient, another constant, and
            none to ``student_text_hidden``. Terms that are not formed are None.
        backend: ``"triton"``; ``"loops"``, in C, for CPUs and anything but float64; ``"torch"``; or ``"auto"``, the
            first of these that can run here. The loops are compiled where they are first needed (some seconds, kept in
            the user's cache; ``CC`` names a compiler); they leave to PyTorch what they do not know, such as logits
            that are given in 16 bits, see docs/how_it_works.md.

    Returns:
        :class:`VGSOutput`; zero tokens give a loss of 0 that is connected to every input that requires grad.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    tokens = Tokens("student_hidden", student_hidden, token_weights, target_ids, ignore_index, reduction, policy)
    request = Request(tokens, vocab_size, backend, vocab_group)
    hidden = request.states("student_hidden", student_hidden)
    text_hidden = request.states("student_text_hidden", student_text_hidden, hidden.shape[1])
    teacher_rows = request.states("teacher_hidden", teacher_hidden)
    teacher_text_rows = request.states("teacher_text_hidden", teacher_text_hidden, teacher_rows.shape[1])
    loose = (student_bias, student_logit_scale, student_softcap)
    student = request.head("student_weight", student_weight, hidden, *loose)
    loose = (teacher_bias, teacher_logit_scale, teacher_softcap)
    teacher = request.head("teacher_weight", teacher_weight, teacher_rows, *loose)
    request.put_kernel_options(workspace_bytes, gradient_tolerance)
    objective = request.put_gating(objective, vds, vds_threshold, trajectory_ids)
    if request.shard and process_group is None and objective.vds_scope == "ranks" and vds_threshold is None:
        raise ValueError("process_group must be given for vds_scope='ranks' with a vocab_group, got None.")

    foldable = objective.lam == 0 and objective.schedule == "constant" and objective.detach_prior
    if not return_terms and foldable and student.softcap is None and teacher.softcap is None:
        rows = [TargetRow(1.0, teacher_rows, teacher)]
        if objective.kappa:
            rows.append(TargetRow(objective.kappa, text_hidden, student))
            rows.append(TargetRow(-objective.kappa, teacher_text_rows, teacher))
        tokens.scale(objective.eta * (1 + objective.gamma))
        out = _linear_divergence(request, hidden, student, rows, True, Divergence(temperature=objective.temperature))
        return VGSOutput(
            out.loss,
            entropy=out.entropy,
            target_logps=out.target_logps,
            policy=out.policy,
            counted=tokens.counted,
            **shares(out),
        )
    request.student |= {"student_hidden": hidden, "student_text_hidden": text_hidden}
    request.fixed |= {"teacher_hidden": teacher_rows, "teacher_text_hidden": teacher_text_rows}
    request.put_head("student", student, request.student)
    request.put_head("teacher", teacher, request.fixed)
    # Counting the gated tokens waits for the device, where nothing bounds their number. Guesses are counted, too, but
    # a call that is captured in a graph makes none.
    counts = objective.lam > 0 and (vds_threshold is not None or objective.vds_scope != "call")
    return _vgs(request, "vgs", objective, process_group, synchronises=counts)


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
    """The VGS loss of logits that the caller holds; scales and soft-caps are the caller's, the temperature ours.

    Only the gradients of the student's logits are allocated, which the backward scales in place (copies, if the graph
    is kept).

    Args:
        student_logits, student_text_logits, teacher_logits, teacher_text_logits: [..., V].
        objective, token_weights, reduction, target_ids, ignore_index, vds, vds_threshold, trajectory_ids, policy,
            vocab_size, process_group, backend: as in :func:`fused_linear_vgs_loss`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    tokens = Tokens("student_logits", student_logits, token_weights, target_ids, ignore_index, reduction, policy)
    request = Request(tokens, vocab_size, backend)
    for name, logits in (("student_logits", student_logits), ("student_text_logits", student_text_logits)):
        request.student[name] = request.logits(name, logits)
    for name, logits in (("teacher_logits", teacher_logits), ("teacher_text_logits", teacher_text_logits)):
        request.fixed[name] = request.logits(name, logits)
    objective = request.put_gating(objective, vds, vds_threshold, trajectory_ids)
    return _vgs(request, "vgs_logits", objective, process_group)


def _vgs(
    request: Request,
    loss: str,
    objective: VGSObjective,
    process_group: torch.distributed.ProcessGroup | None,
    *,
    synchronises: bool = False,
) -> VGSOutput:
    """The VGS loss of a request that has its rows."""
    of_ranks = objective.vds_scope == "ranks"
    request.options["process_group"] = group_name(process_group) if of_ranks else None
    request.put_settings(objective)
    found = request.run(loss, steering.TERMS, synchronises=of_ranks or synchronises)
    return VGSOutput(**{**found, "gate": found["gate"] > 0})


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
    gradient_tolerance: float = 0.0,
    backend: str = "auto",
    **knobs: Any,
) -> DivergenceOutput:
    """D(softmax(student logits), softmax(sum_k c_k * logits_k)) from hidden states; no [N, V] tensor is formed.

    One operation for plain distillation (one row with coefficient 1), VGS with its terms merged (see
    :attr:`VGSObjective.kappa`), contrastive targets, and whatever :class:`Divergence` describes. The target receives no
    gradient, whose rows it may be: a teacher's, or those of the live, a frozen or an averaged student.

    Args:
        student_hidden: [..., D].
        student_weight: [V, D], or a :class:`Head`.
        target: rows (coefficient, hidden [..., Dk], weight [V, Dk] or Head[, bias [V]]) or :class:`TargetRow`.
        divergence: a :class:`Divergence`, or the name of one, whose further settings are then **knobs. The JSD,
            ``clip`` and ``"student_top_k"`` read each tile of logits once more; where the workspace cuts the
            vocabulary, they project again.
        policy: as in :func:`fused_linear_vgs_loss`; not with ``"teacher_top_k"``, outside of which a sampled token has
            no probability, nor with ``reduction="none"``.
        fold: combine rows of the same head (one :class:`Head`, or the same weight and bias objects with one scale; no
            soft-cap) before they are projected: one product instead of several. Their sum is rounded to the hidden
            states' dtype; in bfloat16 a gradient error of 0.15 % becomes one of 0.17 % (distant models) to 0.6 %.
        token_weights, reduction, student_bias, student_softcap, student_logit_scale, target_ids, ignore_index,
            vocab_size, vocab_group, workspace_bytes, gradient_tolerance, backend: as in :func:`fused_linear_vgs_loss`.
        **knobs: ``beta``, ``support``, ``top_k``, ``plausibility``, ``clip``, ``token_clip``, ``temperature`` and
            ``temperature_squared`` of :class:`Divergence`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    divergence = _divergence(divergence, knobs)
    tokens = Tokens("student_hidden", student_hidden, token_weights, target_ids, ignore_index, reduction, policy)
    request = Request(tokens, vocab_size, backend, vocab_group)
    hidden = request.states("student_hidden", student_hidden)
    loose = (student_bias, student_logit_scale, student_softcap)
    student = request.head("student_weight", student_weight, hidden, *loose)
    request.put_kernel_options(workspace_bytes, gradient_tolerance)
    target = enumerate(checks.sequence("target", target, "a sequence of rows"))
    rows = [request.target_row(f"target[{i}]", row) for i, row in target]
    return _linear_divergence(request, hidden, student, rows, fold, divergence)


def _divergence(given: str | Divergence, knobs: dict[str, Any]) -> Divergence:
    if isinstance(given, Divergence) and knobs:
        raise ValueError(f"divergence is a Divergence, whose settings are its own, got {', '.join(knobs)} beside it.")
    return given if isinstance(given, Divergence) else Divergence(given, **knobs)


def _linear_divergence(
    request: Request, hidden: Tensor, student: Head, rows: Sequence[TargetRow], fold: bool, divergence: Divergence
) -> DivergenceOutput:
    """A divergence of hidden states [N, D]; the rows have a :class:`Head` each."""
    groups = grouped(rows, fold)
    # Where the first row is the whole target, it needs no slab of its own to decide.
    first = rows[0].coefficient
    decides = divergence.support == "plausible" and (len(rows) > 1 or isinstance(first, Tensor) or first != 1)
    if decides:
        groups.append([rows[0]._replace(coefficient=1.0)])
    request.student["student_hidden"] = hidden
    request.put_head("student", student, request.student)
    for i, group in enumerate(groups):
        request.put_head(f"head{i}", group[0].weight, request.fixed)
    for i, row in enumerate(row for group in groups for row in group):
        request.put_addend(i, row.coefficient, "hidden", row.hidden)
    request.options |= {"head_rows": [str(len(group)) for group in groups], "decides_last": decides}
    return _run_divergence(request, "divergence", divergence)


def _run_divergence(request: Request, loss: str, divergence: Divergence) -> DivergenceOutput:
    """The divergence of a request that has its rows."""
    if divergence.divergence == "sampled_reverse_kl" and "target_logps" not in request.tokens.names:
        raise ValueError("target_ids must be given for divergence='sampled_reverse_kl', got None.")
    if divergence.support == "teacher_top_k" and "policy" in request.tokens.names:
        raise ValueError("policy cannot be given with support='teacher_top_k', where sampled tokens can be missing.")
    request.put_settings(divergence)
    return DivergenceOutput(**request.run(loss, TERMS))


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
    divergence = _divergence(divergence, knobs)
    tokens = Tokens("student_logits", student_logits, token_weights, target_ids, ignore_index, reduction, policy)
    request = Request(tokens, vocab_size, backend)
    request.student["student_logits"] = request.logits("student_logits", student_logits)
    for i, addend in enumerate(checks.sequence("target", target, "a sequence of addends")):
        coefficient, logits = checks.sequence(f"target[{i}]", addend, "(coefficient, logits)", (2,))
        coefficient = request.coefficient(f"target[{i}]", coefficient)
        request.put_addend(i, coefficient, "logits", request.logits(f"target[{i}].logits", logits))
    request.options["head_rows"] = len(target)
    return _run_divergence(request, "divergence_logits", divergence)
