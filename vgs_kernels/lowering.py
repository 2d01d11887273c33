"""From the checked arguments of the public functions to those of the operator, and back to their outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import checks, divergence_loss, operators, steering
from .divergence import Divergence
from .heads import Head, TargetRow
from .objective import VGSObjective
from .outputs import DivergenceOutput, VGSOutput
from .parallel import group_name
from .rows.layout import accumulation_dtype
from .tokens import Tokens

Tensors, Numbers = dict[str, Tensor | None], dict[str, float | None]


def objective(given: VGSObjective | None) -> VGSObjective:
    if given is not None and not isinstance(given, VGSObjective):
        raise TypeError(f"objective must be a VGSObjective or None, got {type(given).__name__}.")
    return given or VGSObjective()


def divergence(given: str | Divergence, knobs: Mapping[str, Any]) -> Divergence:
    if isinstance(given, Divergence) and knobs:
        raise ValueError(f"divergence is a Divergence, whose settings are its own, got {', '.join(knobs)} beside it.")
    return given if isinstance(given, Divergence) else Divergence(given, **knobs)


def settings(given: VGSObjective | Divergence) -> tuple[Numbers, dict[str, object]]:
    """Fields that are numbers, which may change without a compilation, and the others."""
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    choices = {name: value for name, value in values.items() if isinstance(value, (str, bool))}
    return {name: value for name, value in values.items() if name not in choices}, choices


def head(name: str, given: Head) -> tuple[Tensors, Numbers]:
    """Tensors and numbers of a head."""
    tensors = {f"{name}_weight": given.weight, f"{name}_bias": given.bias}
    return tensors, {f"{name}_scale": given.scale, f"{name}_softcap": given.softcap}


def form(like: Tensor, vocab_group: torch.distributed.ProcessGroup | None) -> dict[str, object]:
    """What is said of the call as a whole."""
    dtype = checks.autocast_dtype(like)
    group = None if vocab_group is None else group_name(vocab_group)
    return {"autocast": None if dtype is None else str(dtype).removeprefix("torch."), "vocab_group": group}


def steered(
    like: Tensor,
    knobs: VGSObjective,
    vds: Tensor | None,
    vds_threshold: float | Tensor | Sequence[float] | None,
    trajectory_ids: Tensor | None,
) -> Tensors:
    """What gates the tokens [..., D]: scores, limits and trajectories."""
    ids = checks.per_token("trajectory_ids", trajectory_ids, like, integer=True)
    if knobs.vds_scope == "trajectory" and ids is None and vds_threshold is None:
        raise ValueError("trajectory_ids must be given for vds_scope='trajectory', got None.")
    limits = _limits(vds_threshold, knobs, like)
    return {"vds": checks.per_token("vds", vds, like), "vds_threshold": limits, "trajectory_ids": ids}


def _limits(value: float | Tensor | Sequence[float] | None, knobs: VGSObjective, like: Tensor) -> Tensor | None:
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
        if any(low > high for low, high in pairwise(values)):
            raise ValueError(f"vds_threshold must be a pair (low, high) with low <= high, got {tuple(values)}.")
        limits = operators.numbers_tensor(values).to(like.device, dtype, non_blocking=True)
    wanted = len(knobs.quantiles)
    if len(limits) != wanted:
        kind = "a pair (low, high)" if wanted == 2 else "one number"
        raise ValueError(f"vds_threshold must be {kind} for schedule={knobs.schedule!r}, got {len(limits)} values.")
    return limits


def vgs(
    kind: str,
    student: Tensors,
    fixed: Tensors,
    numbers: Numbers,
    knobs: VGSObjective,
    tokens: Tokens,
    process_group: torch.distributed.ProcessGroup | None,
    **options: object,
) -> VGSOutput:
    """The VGS loss of these tensors; ``options`` are further lines of the specification."""
    of_ranks, gated = knobs.vds_scope == "ranks", kind == "vgs" and knobs.lam > 0
    counted = gated and (fixed["vds_threshold"] is not None or knobs.vds_scope != "call")
    knob_numbers, choices = settings(knobs)
    value, terms = operators.call(
        kind, student, fixed | tokens.fixed, {**numbers, **tokens.numbers, **knob_numbers},
        terms=[*steering.TERMS, *tokens.terms], reduction=tokens.reduction,
        synchronises=of_ranks or counted or options.get("vocab_group") is not None,
        process_group=group_name(process_group) if of_ranks else None, **options, **choices,
    )  # fmt: skip
    terms = {name: tokens.shaped(x) for name, x in terms.items()}
    gate = terms.pop("gate") > 0
    return VGSOutput(tokens.reduced(value), **terms, gate=gate, counted=tokens.counted_shaped)


def coefficient(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """Check a row's coefficient: a number, or one for each token, then [N] in the precision of sums."""
    if isinstance(value, Tensor):
        return checks.per_token(name, value, like).to(accumulation_dtype(like))
    return checks.number(name, value)


def target_row(name: str, row: TargetRow | Sequence, like: Tensor, shard: bool) -> TargetRow:
    """Check a row of a target, flatten it, and give it a :class:`Head`."""
    if not isinstance(row, (tuple, list)) or not 3 <= len(row) <= 6:
        came = f"{len(row)} entries" if isinstance(row, (tuple, list)) else type(row).__name__
        raise TypeError(f"{name} must be a TargetRow or (coefficient, hidden, weight[, bias]), got {came}.")
    row = TargetRow(*row)
    number = coefficient(f"{name}.coefficient", row.coefficient, like)
    hidden = checks.states(f"{name}.hidden", row.hidden, like)
    loose = {"bias": row.bias, "scale": row.logit_scale, "softcap": row.softcap}
    return TargetRow(number, hidden, checks.head(f"{name}.weight", row.weight, row.hidden, shard=shard, **loose))


def _grouped(rows: Sequence[TargetRow], fold: bool) -> list[list[TargetRow]]:
    """Rows by the head that projects them: if ``fold``, those of the same one together."""
    rows = [row for row in rows if isinstance(row.coefficient, Tensor) or row.coefficient != 0] or rows[:1]
    groups: list[list[TargetRow]] = []
    for row in rows:
        group = next((x for x in groups if fold and x[0].weight.same(row.weight)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def addends(rows: Sequence[tuple[float | Tensor, Tensor]], kind: str) -> tuple[Tensors, Numbers]:
    """Tensors and numbers of a target's addends (coefficient, hidden states or logits)."""
    tensors, numbers = {}, {}
    for i, (factor, values) in enumerate(rows):
        (tensors if isinstance(factor, Tensor) else numbers)[f"row{i}_coefficient"] = factor
        tensors[f"row{i}_{kind}"] = values
    return tensors, numbers


def linear_divergence(
    hidden: Tensor,
    student: Head,
    rows: Sequence[TargetRow],
    fold: bool,
    numbers: Numbers,
    knobs: Divergence,
    tokens: Tokens,
    **options: object,
) -> DivergenceOutput:
    """A divergence of hidden states [N, D]; the rows have a :class:`Head` each."""
    groups = _grouped(rows, fold)
    # Where the first row is the whole target, it needs no slab of its own to decide.
    first = rows[0].coefficient
    decides = knobs.support == "plausible" and (len(rows) > 1 or isinstance(first, Tensor) or first != 1)
    if decides:
        groups.append([rows[0]._replace(coefficient=1.0)])
    fixed, of_rows = addends([row[:2] for group in groups for row in group], "hidden")
    numbers = {**numbers, **of_rows}
    for i, (row, *_) in enumerate(groups):
        tensors, of_head = head(f"head{i}", row.weight)
        fixed, numbers = fixed | tensors, numbers | of_head
    of_student, of_head = head("student", student)
    options |= {"head_rows": [str(len(group)) for group in groups], "decides_last": decides}
    return divergence_of(
        "divergence", {"student_hidden": hidden, **of_student}, fixed, numbers | of_head, knobs, tokens, **options
    )


def divergence_of(
    kind: str,
    student: Tensors,
    fixed: Tensors,
    numbers: Numbers,
    knobs: Divergence,
    tokens: Tokens,
    **options: object,
) -> DivergenceOutput:
    """The divergence of these tensors; ``options`` are further lines of the specification."""
    if knobs.divergence == "sampled_reverse_kl" and tokens.fixed["ids"] is None:
        raise ValueError("target_ids must be given for divergence='sampled_reverse_kl', got None.")
    if knobs.support == "teacher_top_k" and "policy" in tokens.terms:
        raise ValueError("policy cannot be given with support='teacher_top_k', where sampled tokens can be missing.")
    knob_numbers, choices = settings(knobs)
    value, terms = operators.call(
        kind, student, fixed | tokens.fixed, {**numbers, **tokens.numbers, **knob_numbers},
        terms=[*divergence_loss.TERMS, *tokens.terms], reduction=tokens.reduction,
        synchronises=options.get("vocab_group") is not None, **options, **choices,
    )  # fmt: skip
    return DivergenceOutput(tokens.reduced(value), **{name: tokens.shaped(x) for name, x in terms.items()})
