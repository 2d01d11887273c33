"""What a step's loss is made of: the responses of a micro-batch with all that belongs to them, and its means."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from vgs_kernels import DivergenceOutput, PolicyTerm, VGSObjective, VGSOutput
from vgs_kernels.active_columns import SHARES

from ..models.groups import PromptGroup, response_ids, select_responses
from ..models.heads import Head
from ..objectives.definitions import VIEWS
from ..teachers.protocol import TeacherRows

VDS_QUANTILES = (0.4, 0.7)
TERMS = ("standard", "visual", "language", "vds", "gate", "student_vds")
Views = Mapping[str, list[PromptGroup]]
NO_VIEWS: Views = MappingProxyType({})


@dataclass(frozen=True)
class MicroBatch:
    """Responses whose losses add up to one loss, however many passes they take.

    Attributes:
        groups: prompts with their responses.
        teacher: one entry per response.
        weights: token weights [T], one entry per response.
        objective: of this step.
        text: whether the student's text-only view runs.
        terms: whether the per-token terms are wanted.
        known_vds: whether the tokens' VDS is given to the loss.
        limits: [K] VDS thresholds over all tokens; None where the loss takes them itself.
        text_gradient: whether a response's text-only rows need gradient, one entry per response.
        passes: numbers of the responses that run together.
        overlaps: [N] of each pass that has run, see ``vgs.models.overlap``.
        norms: [2] of each pass that has run, see ``vgs.objectives.eta.hidden_norms``; None where they are not wanted.
        policy: a policy gradient on the sampled tokens, [T] tensors, one entry per response; None for none.
    """

    groups: list[PromptGroup]
    teacher: list[TeacherRows]
    weights: Sequence[Tensor]
    objective: VGSObjective
    text: bool
    terms: bool
    known_vds: bool
    limits: Tensor | None
    text_gradient: list[bool]
    passes: list[list[int]]
    policy: Sequence[PolicyTerm] | None = None
    overlaps: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] | None = None

    def teacher_rows(self, chosen: list[int], head: Head, like: Tensor) -> dict[str, Tensor]:
        """view -> [N, Dt] hidden states of the chosen responses; ``"prior"``: [N, Ds], the student's earlier ones."""
        if not chosen:  # there is no entry to tell the views
            none = {view: like.new_zeros(0, head.weight.shape[1]) for view in VIEWS}
            return {**none, "prior": like[:0]}
        entries = [self.teacher[index].rows for index in chosen]
        return {view: torch.cat([entry[view] for entry in entries]).to(like.device) for view in entries[0]}

    def steering(self, chosen: list[int], like: Tensor) -> dict[str, Any]:
        """What the loss is told of the chosen tokens' visual dependency."""
        if not self.known_vds:
            return {}
        return {"vds": joined([self.teacher[index].vds for index in chosen], like), "vds_threshold": self.limits}

    def sampled(self, chosen: list[int], like: Tensor) -> dict[str, Any]:
        """What the loss is told of the chosen responses' sampled tokens."""
        options: dict[str, Any] = {"target_ids": sampled_tokens(select_responses(self.groups, chosen), like)}
        if self.policy is not None:
            options["policy"] = _joined_policy([self.policy[index] for index in chosen], like)
        return options


def _joined_policy(terms: list[PolicyTerm], like: Tensor) -> PolicyTerm:
    if not terms:
        empty = joined([], like)
        return PolicyTerm(empty, empty)
    names = ["advantages", "weights"] + (["old_logps"] if terms[0].old_logps is not None else [])
    return terms[0]._replace(**{name: joined([getattr(term, name) for term in terms], like) for name in names})


def joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """[N] of the responses' [T]."""
    return torch.cat(list(parts)).to(like.device) if parts else like.new_zeros(0, dtype=torch.float32)


def sampled_tokens(groups: Sequence[PromptGroup], like: Tensor) -> Tensor:
    """[N] int64 response tokens of the groups, on the device of ``like``."""
    return response_ids(groups).to(like.device)


def response_names(groups: Sequence[PromptGroup], routes: Sequence[str] | None) -> list[str]:
    """The name of each response's teacher, of ``routes``, one a group; "" for all where there are none."""
    if routes is None:
        routes = [""] * len(groups)
    return [name for name, group in zip(routes, groups, strict=True) for _ in group.responses]


def mean_overlap(accelerator: Accelerator, batch: MicroBatch, k: int | None) -> dict[str, float]:
    """The mean over all tokens of all ranks of what student and teacher share of their ``k`` likeliest tokens."""
    if k is None:
        return {}
    values = torch.cat(batch.overlaps)
    total, count = accelerator.reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), reduction="sum")
    return {f"top_{k}_overlap": (total / count.clamp(min=1)).item()}


def mean_left_out(accelerator: Accelerator, outputs: Sequence[VGSOutput | DivergenceOutput]) -> dict[str, float]:
    """What ``gradient_tolerance`` has left out of the gradients: the means over all tokens of all ranks of ``SHARES``,
    and the most that a token has lost."""
    counts = [output.entropy.new_zeros(len(output.entropy)) for output in outputs]
    columns = [
        torch.cat(
            [none if getattr(x, name) is None else getattr(x, name) for x, none in zip(outputs, counts, strict=True)]
        )
        for name in SHARES
    ]
    count = columns[0].new_tensor(len(columns[0]))
    totals = accelerator.reduce(torch.stack([*(column.sum() for column in columns), count]), reduction="sum")
    means = dict(zip(SHARES, (totals[:-1] / totals[-1].clamp(min=1)).tolist(), strict=True))
    most = torch.cat([columns[SHARES.index("gradient_lost")], count.new_zeros(1)]).amax().reshape(1)
    return {**means, "gradient_lost_max": accelerator.gather(most).max().item()}


def mean_terms(
    accelerator: Accelerator, outputs: Sequence[VGSOutput | DivergenceOutput], terms: bool
) -> dict[str, float]:
    """Means over all tokens of all ranks: entropy, the divergence or policy term of losses that have one and, if
    ``terms``, those of the steered objective that the loss has formed, VDS quantiles, and ``sight``: the share of the
    teacher's visual dependency that the student has (``gamma_guard``). ``tokens`` is their number."""
    names = [*(TERMS if terms else ()), "divergence", "policy"]
    names = ["entropy", *(name for name in names if getattr(outputs[0], name, None) is not None)]
    columns = {name: torch.cat([getattr(output, name).float() for output in outputs]) for name in names}
    entropy = columns["entropy"]
    if terms and {"vds", "student_vds"} <= columns.keys():
        columns["sight"] = torch.minimum(columns["vds"], columns["student_vds"])
    sums = torch.stack([*[column.sum() for column in columns.values()], entropy.new_tensor(len(entropy))])
    sums = accelerator.gather(sums[None]).sum(dim=0)
    tokens = sums[-1:]
    *values, count = torch.cat([sums[:-1] / tokens.clamp(min=1), tokens]).tolist()
    means = {**dict(zip(columns, values, strict=True)), "tokens": count}
    if seen := means.pop("sight", None):
        means["sight"] = seen / means["vds"]
    if "vds" in columns:
        padded = accelerator.gather(accelerator.pad_across_processes(columns["vds"], pad_index=math.nan))
        levels = entropy.new_tensor(VDS_QUANTILES)
        quantiles = torch.nanquantile(padded, levels) if len(padded) else torch.full_like(levels, math.nan)
        names = [f"vds_q{round(100 * level)}" for level in VDS_QUANTILES]
        means |= dict(zip(names, quantiles.tolist(), strict=True))
    return means
