"""The parts of a step: the teacher's phase over a generation batch, and the student's passes of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from vgs_kernels import DivergenceOutput, PolicyTerm, VGSObjective, VGSOutput

from ..models.forward import score_with_anchor
from ..models.groups import PromptGroup, response_lengths, select_responses, trajectory_ids
from ..models.heads import Head, read_head, token_logps, visual_dependency, whole_heads
from ..models.overlap import top_k_overlap
from ..objectives.definitions import VIEWS, Preset, shared_limits
from ..objectives.eta import hidden_norms
from ..objectives.weighting import weigh
from ..teachers.protocol import Teacher, TeacherRows
from .batching import plan_passes
from .micro_batch import NO_VIEWS, MicroBatch, Views, joined, response_names, sampled_tokens
from .settings import VGSOptions

UNSHARDED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


@dataclass
class StepScorer:
    """Runs student and teacher over groups, in passes, on whatever holds their parameters.

    Attributes:
        args: the run's settings: ``VGSOptions``, and a temperature and per_device_train_batch_size.
        accelerator: knows the processes.
        teachers: name -> teacher; one alone has the name "". Each response has one of them.
        anchor: a prompt with a small image. On several processes it joins passes without images, so that all of them
            run the vision tower, in the backward too; with no weight in the loss. None without such a tower.
        packs: whether all models that run here have families that run as packed rows.
        prior_head: the output head that the prior's rows go with, given the student; None where the prior is the
            student's own.
        strict: whether a response that is longer than a pass may be is an error; in evaluation it has a pass of its
            own, which without gradient takes less memory than one in training.
    """

    args: VGSOptions
    accelerator: Accelerator
    teachers: Mapping[str, Teacher]
    anchor: PromptGroup | None
    packs: bool
    prior_head: Callable[[nn.Module, torch.dtype], Head] | None = None
    strict: bool = True

    @property
    def preset(self) -> Preset:
        return self.args.preset_in_force

    @property
    def sharded(self) -> bool:
        """Whether parameters are gathered layer by layer, so that every rank must run the same forwards."""
        return self.accelerator.distributed_type not in UNSHARDED

    def needs_text(self, objective: VGSObjective) -> bool:
        """Whether anything, the log included, needs the text-only view."""
        return self.preset.scores_text(objective, self.args.log_terms)

    def _terms(self, wanted: bool) -> bool:
        return wanted and self.preset.has_terms

    def _needs_vds(self, objective: VGSObjective) -> bool:
        """Whether scores are wanted before the student runs: where its loss depends on tokens of other passes."""
        split = self.args.max_tokens_per_pass is not None or len(self.teachers) > 1
        return self.preset.needs_vds(objective, split=split)

    @property
    def _loss_options(self) -> dict[str, Any]:
        return {
            "vocab_size": self.args.vocab_size,
            "workspace_bytes": self.args.loss_workspace_bytes,
            "gradient_tolerance": self.args.gradient_tolerance,
            "backend": self.args.loss_backend,
        }

    def _plan(self, groups: Sequence[PromptGroup], text: bool) -> list[list[int]]:
        shared = self.args.share_prefix and self.packs
        return plan_passes(groups, self.args.max_tokens_per_pass, text=text, share_prefix=shared, strict=self.strict)

    @staticmethod
    def _by_teacher(names: Sequence[str], plan: Callable[[list[int]], list[list[int]]]) -> list[list[int]]:
        """Passes in which all responses have the same teacher.

        Args:
            names: of every response's teacher.
            plan: the passes of some responses, by their places among these.
        """
        passes = []
        for name in dict.fromkeys(names):
            own = [index for index, found in enumerate(names) if found == name]
            passes += [[own[place] for place in chosen] for chosen in plan(own)]
        return passes

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
        return score_with_anchor(
            model,
            groups,
            self.anchor if together else None,
            text=text,
            text_gradient=text_gradient,
            share_prefix=self.args.share_prefix,
            kernel=self.args.packed_attention,
        )

    # ---- the teacher's phase

    @torch.no_grad()
    def score_teacher(
        self,
        groups: list[PromptGroup],
        objective: VGSObjective,
        text: bool,
        views: Views = NO_VIEWS,
        routes: Sequence[str] | None = None,
    ) -> list[TeacherRows]:
        """Hidden states of all responses, and what else the loss needs of them; one entry per response.

        Args:
            groups: prompts with their responses.
            objective: of the step that will use them.
            text: whether to score the text-only view.
            views: further views, with the responses of ``groups``.
            routes: the name of each group's teacher; None where there is one alone.

        Raises:
            ValueError: the preset needs a view that is not in ``views``.
        """
        wanted = [view for model, view in sorted(self.preset.rows) if model == "teacher" and view != "text"]
        if missing := sorted(set(wanted) - {"image", *views}):
            raise ValueError(f"views must have {missing[0]!r} for preset={self.preset.name!r}, got {sorted(views)}.")
        names = response_names(groups, routes)
        found: list[dict[str, Tensor]] = [{} for _ in names]
        for name, teacher in self.teachers.items():
            own = [index for index, other in enumerate(names) if other == name]
            if not own and not teacher.sharded:
                continue
            with teacher.ready(), self.accelerator.autocast():
                for view in wanted:
                    scored, both = (groups, text) if view == "image" else (views[view], False)
                    part = select_responses(scored, own)
                    for places in self.rollout_passes(part, text=both, shared=teacher.sharded):
                        chosen = [own[place] for place in places]
                        asked = select_responses(scored, chosen)
                        for column, values in self._teacher_pass(teacher, asked, view, objective, both).items():
                            for index, piece in zip(chosen, values.split(response_lengths(asked)), strict=True):
                                found[index][column] = piece
        factors = self._factors(groups, found)
        return [
            TeacherRows({view: entry[view] for view in VIEWS if view in entry}, entry.get("vds"), factor, name)
            for entry, factor, name in zip(found, factors, names, strict=True)
        ]

    def _factors(self, groups: list[PromptGroup], found: list[dict[str, Tensor]]) -> list[Tensor | None]:
        """The preset's factors on the token weights; taken over all responses to a prompt, however they are split."""
        weighting = self.preset.weighting
        if weighting is None:
            return [None] * len(found)
        factors, first = [], 0
        for group in groups:
            own = found[first : first + len(group.responses)]
            first += len(own)
            image, control = ([entry[f"logps {view}"] for entry in own] for view in ("image", "control"))
            factors += weigh(weighting, image, control)
        return factors

    def rollout_passes(self, groups: list[PromptGroup], *, text: bool = False, shared: bool = False) -> list[list[int]]:
        """Passes without gradient over a whole generation batch; as many on every rank if they are ``shared``."""
        if self.args.max_tokens_per_pass is None:
            size, count = self.args.per_device_train_batch_size, len(response_lengths(groups))
            passes = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        else:
            passes = self._plan(groups, text)
        return self._equal(passes) if shared else passes

    def plain_rows(self, model: nn.Module, groups: list[PromptGroup]) -> tuple[None, Tensor]:
        """A task of ``run_inside``: [N, D] hidden states of a model that all ranks run if it is sharded."""
        (rows,), _ = self._rows(model, groups, text=False, text_gradient=False, together=self.sharded)
        return None, rows

    def _teacher_pass(
        self, teacher: Teacher, groups: list[PromptGroup], view: str, objective: VGSObjective, text: bool
    ) -> dict[str, Tensor]:
        """Columns of N tokens: hidden states by view, "vds", and log-probabilities "logps VIEW"."""
        with_vds = self._needs_vds(objective) and view == "image"
        weighed = self.preset.weighting is not None and view in ("image", "control")

        def look(rows: list[Tensor]) -> dict[str, Tensor]:
            # Hidden states of a view that only weighs tokens would wait for nothing.
            columns = {
                name: x
                for name, x in zip((view, "text"), rows, strict=False)
                if name == "text" or self.preset.targets(name)
            }
            if not (with_vds or weighed):
                return columns
            with teacher.head(rows[0].dtype) as head:
                if with_vds:
                    columns["vds"] = visual_dependency(rows, head, objective.temperature, **self._loss_options)
                if weighed:
                    ids = sampled_tokens(groups, rows[0])
                    logps = token_logps(rows[0], ids, head, objective.temperature, **self._loss_options)
                    columns[f"logps {view}"] = logps
            return columns

        return teacher.states(groups, text, look)

    # ---- the student's passes

    def micro_batch(
        self,
        groups: list[PromptGroup],
        teacher: list[TeacherRows],
        weights: Sequence[Tensor],
        objective: VGSObjective,
        terms: bool,
        *,
        policy: Sequence[PolicyTerm] | None = None,
    ) -> MicroBatch:
        """Plan the student's passes over responses that the teacher has scored. Collective on several processes.

        Args:
            groups: prompts with their responses.
            teacher, weights, policy: one entry per response, see ``MicroBatch``; the preset's factors are
                put on the weights here.
            objective: of this step.
            terms: whether the per-token terms are wanted, where the preset has some.
        """
        preset, limits = self.preset, None
        gated = [preset.needs_text_gradient(objective)] * len(teacher)
        known_vds = self._needs_vds(objective)
        if known_vds:
            limits, gated = self._gate(groups, teacher, objective)
        terms = self._terms(terms)
        text = terms or preset.needs_own_text(objective)
        passes = self._by_teacher(
            [entry.teacher for entry in teacher], lambda own: self._plan(select_responses(groups, own), text)
        )
        if self.accelerator.num_processes > 1:
            passes = self._equal(passes)
        weights = [
            weight if entry.factors is None else weight * entry.factors
            for weight, entry in zip(weights, teacher, strict=True)
        ]
        return MicroBatch(groups, teacher, weights, objective, text, terms, known_vds, limits, gated, passes, policy)

    def _gate(
        self, groups: list[PromptGroup], teacher: list[TeacherRows], objective: VGSObjective
    ) -> tuple[Tensor | None, list[bool]]:
        """VDS thresholds [K] (None if each trajectory has its own), and which responses have gated tokens."""
        vds = torch.cat([entry.vds for entry in teacher])
        limits, common = shared_limits(vds, objective, trajectory_ids(groups).to(vds.device))
        live_prior = not objective.detach_prior and objective.gamma > 0
        if self.sharded or live_prior or objective.lam == 0 or not self.preset.steered:
            return common, [self.preset.needs_text_gradient(objective)] * len(teacher)
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
        uniform = self.preset.needs_text_gradient(batch.objective) if self.sharded or not flags else flags
        together = self.accelerator.num_processes > 1
        name = batch.teacher[chosen[0]].teacher if chosen else next(iter(self.teachers))
        with_ids = batch.policy is not None or self.preset.needs_ids
        # Also for a student that accelerate has not prepared, whose forward has no autocast of its own.
        with self.accelerator.autocast():
            rows, zero = self._rows(student, groups, batch.text, uniform, together)
            states = dict(zip(("image", "text"), rows, strict=False))
            with whole_heads(student), self.teachers[name].head(rows[0].dtype) as teacher_head:
                student_head = read_head(student, rows[0].dtype)
                # With a model split over devices, the backbone can end elsewhere than the head.
                states = {view: x.to(student_head.weight.device) for view, x in states.items()}
                prior = {}
                teacher = batch.teacher_rows(chosen, teacher_head, states["image"])
                if self.prior_head is not None and self.args.gamma > 0:
                    prior["prior_head"] = self.prior_head(student, rows[0].dtype)
                weights = joined([batch.weights[index] for index in chosen], states["image"])
                output = self.preset.loss(
                    states,
                    teacher,
                    student_head,
                    teacher_head,
                    objective=batch.objective,
                    token_weights=weights,
                    trajectory_ids=trajectory_ids(groups).to(student_head.weight.device),
                    return_terms=batch.terms,
                    **(self._sampled(batch, chosen, states["image"]) if with_ids else {}),
                    **batch.steering(chosen, states["image"]),
                    **prior,
                    **self._loss_options,
                )
                if batch.norms is not None:
                    pair = states["image"], student_head, teacher["image"], teacher_head
                    scaled, options = batch.objective.eta * weights, {"temperature": batch.objective.temperature}
                    batch.norms.append(hidden_norms(output.loss, *pair, scaled, **options, **self._loss_options))
                output = self._with_policy(output, batch, chosen, states["image"], student_head)
                if self.args.log_overlap is not None:
                    options = self.args.log_overlap, self.args.vocab_size, self.args.loss_workspace_bytes
                    likened = teacher[self.preset.taught_view]
                    overlap = top_k_overlap(states["image"], student_head, likened, teacher_head, *options)
                    batch.overlaps.append(overlap)
        return output.loss if zero is None else output.loss + zero, output

    def _sampled(self, batch: MicroBatch, chosen: list[int], like: Tensor) -> dict[str, Any]:
        """What the preset's loss is told of the sampled tokens."""
        return batch.sampled(chosen, like)

    def _with_policy(
        self, output: VGSOutput | DivergenceOutput, batch: MicroBatch, chosen: list[int], rows: Tensor, head: Head
    ) -> VGSOutput | DivergenceOutput:
        """The preset's output with a policy term that it could not take along."""
        return output
