"""The parts of a step: the teacher's phase over a generation batch, and the student's passes of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import maybe_gather_lm_head_ctx

from vgs_kernels import DivergenceOutput, VGSObjective, VGSOutput
from vgs_kernels.gating import thresholds
from vgs_kernels.parallel import group_name

from .config import VGSConfig
from .groups import PromptGroup, response_lengths, trajectory_ids
from .heads import Head, head_parameters, read_head
from .passes import plan_passes, select_responses
from .scoring import fused_loss, score_groups
from .teacher import Offload, TeacherRows, visual_dependency

VDS_QUANTILES = (0.4, 0.7)
TERMS = ("standard", "visual", "language", "vds", "gate", "student_vds")
UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass(frozen=True)
class MicroBatch:
    """Responses whose losses add up to one loss, however many passes they take.

    Attributes:
        groups: prompts with their responses.
        teacher: one entry per response.
        weights: token weights [T], one entry per response.
        objective: of this step.
        terms: whether the per-token terms are wanted.
        known_vds: whether the tokens' VDS is given to the loss.
        limits: [K] VDS thresholds over all tokens; None where the loss takes them itself.
        text_gradient: whether a response's text-only rows need gradient, one entry per response.
        passes: numbers of the responses that run together.
    """

    groups: list[PromptGroup]
    teacher: list[TeacherRows]
    weights: Sequence[Tensor]
    objective: VGSObjective
    terms: bool
    known_vds: bool
    limits: Tensor | None
    text_gradient: list[bool]
    passes: list[list[int]]

    @property
    def text(self) -> bool:
        """Whether anything needs the text-only view."""
        return self.terms or self.objective.needs_text


def run_inside(
    redirect: _ForwardRedirection,
    wrapper: nn.Module,
    model: nn.Module,
    task: Callable[[], tuple[Tensor | None, Any]],
) -> tuple[Tensor | None, Any]:
    """Run a task inside a wrapper's forward, where its parameters are.

    Only the loss passes through the wrapper: in mixed precision FSDP2 rounds every tensor that goes in or out.

    Args:
        redirect: the host's.
        wrapper: the model as prepared by the accelerator.
        model: the same, unwrapped.
        task: returns a loss that needs gradient (or None) and anything else.

    Returns:
        What the task returns; its loss as it left the wrapper.
    """
    rest = []

    def method(run: Callable[[], tuple[Tensor | None, Any]]) -> Tensor | None:
        loss, other = run()
        rest.append(other)
        return loss

    return redirect(wrapper, model, method, task), rest[0]


@dataclass
class StepScorer:
    """Runs student and teacher over groups, in passes, on whatever holds their parameters.

    Attributes:
        args: the run's settings.
        accelerator: knows the processes.
        teacher_model: as prepared by the accelerator.
        anchor: a prompt with a small image. On several processes it joins passes without images, so that all of them
            run the vision tower, in the backward too; with no weight in the loss.
        packs: whether both models' families run as packed rows.
    """

    args: VGSConfig
    accelerator: Accelerator
    teacher_model: nn.Module
    anchor: PromptGroup
    packs: bool
    _redirect: _ForwardRedirection = field(default_factory=_ForwardRedirection)
    _offload: Offload | None = None

    def __post_init__(self) -> None:
        self.teacher_model.eval()
        if self.args.teacher_offload:
            self._offload = Offload(self._teacher, head_parameters(self._teacher), self.accelerator.device)

    @property
    def _teacher(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.teacher_model)

    @property
    def sharded(self) -> bool:
        """Whether parameters are gathered layer by layer, so that every rank must run the same forwards."""
        return self.accelerator.distributed_type not in UNSHARDED

    def _needs_vds(self, objective: VGSObjective) -> bool:
        """Whether scores are wanted before the student runs: where its loss depends on tokens of other passes.

        In one pass the loss finds its own threshold, which costs fewer products with the heads.
        """
        adaptive = objective.schedule == "adaptive" and objective.gamma > 0
        return adaptive or (objective.lam > 0 and self.args.max_tokens_per_pass is not None)

    @property
    def _loss_options(self) -> dict[str, Any]:
        return {
            "vocab_size": self.args.vocab_size,
            "workspace_bytes": self.args.loss_workspace_bytes,
            "backend": self.args.loss_backend,
        }

    def _plan(self, groups: Sequence[PromptGroup], text: bool) -> list[list[int]]:
        shared = self.args.share_prefix and self.packs
        return plan_passes(groups, self.args.max_tokens_per_pass, text=text, share_prefix=shared)

    def _equal(self, passes: list[list[int]]) -> list[list[int]]:
        """As many passes on every rank, for what they do together. Those that are added are empty."""
        count = torch.tensor([len(passes)], device=self.accelerator.device)
        most = int(self.accelerator.gather(count).max())
        return passes + [[] for _ in range(max(most, 1) - len(passes))]

    def _rows(
        self, model: nn.Module, groups: list[PromptGroup], text: bool, text_gradient: bool | list[bool], together: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Hidden states [N, D] of the groups' views, and, where ranks run layers together, a zero that carries
        gradient to an image."""
        count = sum(response_lengths(groups))
        anchored = together and not any(group.has_images for group in groups)
        if anchored:
            groups = [*groups, self.anchor]
            if not isinstance(text_gradient, bool):
                text_gradient = [*text_gradient, False]
        rows = score_groups(
            model,
            groups,
            text=text,
            text_gradient=text_gradient,
            share_prefix=self.args.share_prefix,
            kernel=self.args.packed_attention,
        )
        zero = 0.0 * sum(x[count:].float().sum() for x in rows) if anchored else None
        return [x[:count] for x in rows], zero

    # ---- the teacher's phase

    @torch.no_grad()
    def score_teacher(self, groups: list[PromptGroup], objective: VGSObjective, text: bool) -> list[TeacherRows]:
        """Hidden states of all responses, and their VDS if the loss needs it; one entry per response.

        Args:
            groups: prompts with their responses.
            objective: of the step that will use them.
            text: whether to score the text-only view.
        """
        teacher = self._teacher
        found: dict[int, TeacherRows] = {}
        with self._offload.on_device() if self._offload else nullcontext(), self.accelerator.autocast():
            for chosen in self._teacher_passes(groups, text):
                part = select_responses(groups, chosen)
                task = partial(self._teacher_pass, teacher, part, objective, text)
                _, (rows, vds) = run_inside(self._redirect, self.teacher_model, teacher, task)
                lengths = response_lengths(part)
                scores = [None] * len(lengths) if vds is None else vds.split(lengths)
                views = zip(*[x.split(lengths) for x in rows], strict=True)
                entries = [TeacherRows(*entry) for entry in zip(views, scores, strict=True)]
                found |= dict(zip(chosen, entries, strict=True))
        return [found[index] for index in sorted(found)]

    @property
    def _teacher_sharded(self) -> bool:
        """The host shards the teacher under DeepSpeed alone; FSDP leaves it whole on every rank."""
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _teacher_passes(self, groups: list[PromptGroup], text: bool) -> list[list[int]]:
        if self.args.max_tokens_per_pass is None:
            size, count = self.args.per_device_train_batch_size, len(response_lengths(groups))
            passes = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        else:
            passes = self._plan(groups, text)
        return self._equal(passes) if self._teacher_sharded else passes

    def _teacher_pass(
        self, teacher: nn.Module, groups: list[PromptGroup], objective: VGSObjective, text: bool
    ) -> tuple[None, tuple[list[Tensor], Tensor | None]]:
        rows, _ = self._rows(teacher, groups, text, text_gradient=False, together=self._teacher_sharded)
        if not self._needs_vds(objective):
            return None, (rows, None)
        with maybe_gather_lm_head_ctx(*head_parameters(teacher)):
            head = read_head(teacher, rows[0].dtype)
            return None, (rows, visual_dependency(rows, head, objective.temperature, **self._loss_options))

    # ---- the student's passes

    def micro_batch(
        self,
        groups: list[PromptGroup],
        teacher: list[TeacherRows],
        weights: Sequence[Tensor],
        objective: VGSObjective,
        terms: bool,
    ) -> MicroBatch:
        """Plan the student's passes over responses that the teacher has scored. Collective on several processes."""
        limits = None
        gated = [objective.needs_text_gradient] * len(teacher)
        known_vds = self._needs_vds(objective)
        if known_vds:
            limits, gated = self._gate(groups, teacher, objective)
        passes = self._plan(groups, terms or objective.needs_text)
        if self.accelerator.num_processes > 1:
            passes = self._equal(passes)
        return MicroBatch(groups, teacher, weights, objective, terms, known_vds, limits, gated, passes)

    def _gate(
        self, groups: list[PromptGroup], teacher: list[TeacherRows], objective: VGSObjective
    ) -> tuple[Tensor | None, list[bool]]:
        """VDS thresholds [K] (None if each trajectory has its own), and which responses have gated tokens."""
        vds = torch.cat([entry.vds for entry in teacher])
        trajectories = trajectory_ids(groups).to(vds.device)
        name = group_name(None) if objective.vds_scope == "ranks" else None
        limits = thresholds(vds, objective, trajectories, name)
        pooled = objective.vds_scope != "trajectory"
        common = None
        if pooled:  # a rank without tokens needs no threshold, but the loss must not ask the others for theirs
            common = torch.stack([limit[0] if len(limit) else limit.new_zeros(()) for limit in limits])
        live_prior = not objective.detach_prior and objective.gamma > 0
        if self.sharded or live_prior or objective.lam == 0:
            return common, [objective.needs_text_gradient] * len(teacher)
        opened = (vds > limits[-1]).split(response_lengths(groups))
        return common, torch.stack([gate.any() for gate in opened]).tolist()

    def pass_loss(
        self, student: nn.Module, batch: MicroBatch, chosen: list[int]
    ) -> tuple[Tensor, VGSOutput | DivergenceOutput]:
        """One pass: its part of the micro-batch's loss, and the terms of its tokens.

        Runs inside the student wrapper's forward, where its parameters are. An empty pass costs a small image and
        gives 0.
        """
        groups = select_responses(batch.groups, chosen)
        flags = [batch.text_gradient[index] for index in chosen]
        uniform = batch.objective.needs_text_gradient if self.sharded or not flags else flags
        teacher = self._teacher
        # The host's redirection replaces the very forward that Accelerate wraps in autocast, so it is entered here.
        with self.accelerator.autocast():
            together = self.accelerator.num_processes > 1
            rows, zero = self._rows(student, groups, batch.text, uniform, together)
            with maybe_gather_lm_head_ctx(*head_parameters(student), *head_parameters(teacher)):
                student_head, teacher_head = (read_head(model, rows[0].dtype) for model in (student, teacher))
                output = fused_loss(
                    rows,
                    self._teacher_rows(batch, chosen, teacher_head, rows[0]),
                    student_head,
                    teacher_head,
                    batch.objective,
                    token_weights=_joined([batch.weights[index] for index in chosen], rows[0]),
                    trajectory_ids=trajectory_ids(groups),
                    return_terms=batch.terms,
                    **self._steering(batch, chosen, rows),
                    **self._loss_options,
                )
        return output.loss if zero is None else output.loss + zero, output

    def _teacher_rows(self, batch: MicroBatch, chosen: list[int], head: Head, like: Tensor) -> list[Tensor]:
        views = 2 if batch.text else 1
        if not chosen:
            return [like.new_zeros(0, head.weight.shape[1]) for _ in range(views)]
        return [torch.cat([batch.teacher[index].rows[view] for index in chosen]) for view in range(views)]

    def _steering(self, batch: MicroBatch, chosen: list[int], rows: list[Tensor]) -> dict[str, Any]:
        if not batch.known_vds:
            return {}
        vds = _joined([batch.teacher[index].vds for index in chosen], rows[0])
        return {"vds": vds, "vds_threshold": batch.limits}


def _joined(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_zeros(0, dtype=torch.float32)


def mean_terms(
    accelerator: Accelerator, outputs: Sequence[VGSOutput | DivergenceOutput], terms: bool
) -> dict[str, float]:
    """Means over all tokens of all ranks: entropy and, if ``terms``, the objective's terms and VDS quantiles."""
    names = ("entropy", *TERMS) if terms else ("entropy",)
    columns = {name: torch.cat([getattr(output, name).float() for output in outputs]) for name in names}
    entropy = columns["entropy"]
    sums = torch.stack([*[column.sum() for column in columns.values()], entropy.new_tensor(len(entropy))])
    sums = accelerator.gather(sums[None]).sum(dim=0)
    means = dict(zip(names, (sums[:-1] / sums[-1].clamp(min=1)).tolist(), strict=True))
    if terms:
        padded = accelerator.pad_across_processes(columns["vds"], pad_index=math.nan)
        quantiles = torch.nanquantile(accelerator.gather(padded), entropy.new_tensor(VDS_QUANTILES))
        names = [f"vds_q{round(100 * level)}" for level in VDS_QUANTILES]
        means |= dict(zip(names, quantiles.tolist(), strict=True))
    return means
