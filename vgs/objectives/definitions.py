"""What a preset is: rows of a target, a divergence, weights; and the losses that take more than one divergence.

A model scores a response in a view of its prompt. Views are ``"image"`` (the prompt as it is), ``"text"`` (without its
images), ``"control"`` (with degraded images, ``vgs.data.degraded``) and ``"privileged"`` (with context that the student
does not see). A row is a model in a view.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vgs_kernels import (
    Divergence,
    DivergenceOutput,
    PolicyTerm,
    TargetRow,
    VGSObjective,
    VGSOutput,
    fused_linear_divergence,
)
from vgs_kernels.gating import thresholds
from vgs_kernels.parallel import group_name

from ..models.forward import fused_loss
from ..models.heads import Head
from .weighting import Weighting

VIEWS = ("image", "text", "control", "privileged")
TEACHERS = ("separate", "frozen", "ema")
Rows = Mapping[str, Tensor]
STEERING = frozenset(
    {
        *("gamma", "lam", "vds_quantile", "adaptive_quantile", "detach_prior", "schedule", "vds_scope"),
        *("gamma_guard", "gamma_warmup_steps", "eta_batches", "eta_every", "lp_every", "prior_decay"),
    }
)
SETTINGS = STEERING | {"control_kind"}  # that only some presets read


class Addend(NamedTuple):
    """coefficient * logits of a model (``"student"``, ``"teacher"`` or ``"prior"``) in a view: a part of the target."""

    coefficient: float
    model: str
    view: str


TEACHER = Addend(1.0, "teacher", "image")
PRIVILEGED = Addend(1.0, "teacher", "privileged")


@dataclass(frozen=True)
class Preset:
    """One objective: D(student, softmax(sum of the target's rows)), summed over tokens with weights.

    Attributes:
        name: as in a config.
        paper: arXiv id.
        equation: what the paper minimises per token, in short.
        target: rows of the target. They and all weights are constants; only the student's row in the view ``"image"``
            (and in ``"text"``, where the text-only view is trained) carries gradient.
        divergence: D.
        scale: factor on the loss.
        weighting: factors on the tokens' weights from the teacher's rows ``"image"`` and ``"control"``.
        teacher: ``"separate"``: another model; ``"frozen"`` and ``"ema"``: the student's initial or averaged weights.
        ema_decay: of the averaged weights, per optimizer step.
        control: kind of the images in the view ``"control"``, see ``vgs.data.degraded``.
        generations: fewest responses to a prompt.
        schedule: of gamma, where the preset fixes it.
        settings: of the trainer, where they are left open.
    """

    name: str
    paper: str
    equation: str
    target: tuple[Addend, ...] = (TEACHER,)
    divergence: Divergence = field(default_factory=Divergence)
    scale: float = 1.0
    weighting: Weighting | None = None
    teacher: str = "separate"
    ema_decay: float | None = None
    control: str | None = None
    generations: int = 1
    schedule: str | None = None
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    steered: ClassVar[bool] = False  # whether it is VGS, which eta="measure" and prior belong to
    has_terms: ClassVar[bool] = False  # whether its loss can give the terms of VGSObjective
    fixed_divergence: ClassVar[bool] = False  # whether its loss is derived for the reverse KL alone
    own_settings: ClassVar[frozenset[str]] = frozenset()  # of SETTINGS, those that its loss reads

    def reads(self, setting: str) -> bool:
        """Whether its loss reads one of ``SETTINGS``."""
        return setting in self.own_settings or (setting == "control_kind" and self.control is not None)

    @property
    def rows(self) -> set[tuple[str, str]]:
        """(model, view) of every row that may be needed."""
        weighed = {("teacher", "image"), ("teacher", "control")} if self.weighting is not None else set()
        return {("student", "image")} | {(addend.model, addend.view) for addend in self.target} | weighed

    @property
    def views(self) -> set[str]:
        """Views that any model scores."""
        return {view for _, view in self.rows}

    @property
    def taught_view(self) -> str:
        """The view of the first row of the teacher's in the target."""
        return next(addend.view for addend in self.target if addend.model == "teacher")

    def targets(self, view: str) -> bool:
        """Whether the target has the teacher's row in this view."""
        return any(addend[1:] == ("teacher", view) for addend in self.target)

    @property
    def needs_ids(self) -> bool:
        """Whether the loss looks at the sampled tokens."""
        return self.divergence.divergence == "sampled_reverse_kl"

    def needs_text(self, objective: VGSObjective) -> bool:
        """Whether the loss needs the teacher's text-only view."""
        return "text" in self.views

    def scores_text(self, objective: VGSObjective, terms: bool) -> bool:
        """Whether the teacher's text-only view is scored: for the loss, or for its ``terms`` if these are wanted."""
        return self.needs_text(objective) or (terms and self.has_terms)

    def needs_own_text(self, objective: VGSObjective) -> bool:
        """Whether the loss needs the student's text-only view."""
        return self.needs_text(objective)

    def needs_text_gradient(self, objective: VGSObjective) -> bool:
        """Whether the student's text-only rows receive gradient."""
        return False

    def needs_vds(self, objective: VGSObjective, split: bool) -> bool:
        """Whether the loss must be given the tokens' VDS, in a micro-batch that is (not) split into passes."""
        return False

    def configured(self, temperature: float, /, **changes: Any) -> Preset:
        """With a run's temperature, and changes to the divergence.

        Raises:
            ValueError, TypeError: a change that ``Divergence`` refuses, or any where the divergence is fixed.
        """
        known = [field.name for field in dataclasses.fields(Divergence) if field.name != "temperature"]
        if unknown := [str(name) for name in changes if name not in known]:
            raise ValueError(f"divergence has the key {unknown[0]!r}; expected some of {', '.join(known)}.")
        if changes and self.fixed_divergence:
            raise ValueError(
                f"divergence must be left out for preset={self.name!r}, got {changes}: its loss is derived for the "
                "reverse KL over the whole vocabulary alone."
            )
        return replace(self, divergence=replace(self.divergence, temperature=temperature, **changes))

    def loss(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        *,
        objective: VGSObjective,
        token_weights: Tensor,
        target_ids: Tensor | None = None,
        trajectory_ids: Tensor | None = None,
        policy: PolicyTerm | None = None,
        vds: Tensor | None = None,
        vds_threshold: Tensor | None = None,
        return_terms: bool = True,
        **options: Any,
    ) -> DivergenceOutput | VGSOutput:
        """The loss of N response tokens; all tensors on the device of the heads.

        Args:
            student_rows, teacher_rows: view -> [N, Ds] or [N, Dt] hidden states, at least those of ``rows``.
            student_head, teacher_head: from ``read_head``.
            objective: eta, and for presets that steer gamma, lam and the rest.
            token_weights: [N] float32; eta multiplies them.
            target_ids: [N] int64 sampled tokens; needed by ``sampled_reverse_kl`` and ``policy``.
            trajectory_ids: [N] int64, see ``groups.trajectory_ids``.
            policy: added to the loss.
            vds, vds_threshold: [N] and [K], of presets that gate tokens, see ``fused_linear_vgs_loss``.
            return_terms: whether the per-token terms are wanted.
            **options: vocab_size, workspace_bytes, gradient_tolerance and backend of the fused losses.
        """
        heads = {"student": student_head, "teacher": teacher_head}
        rows = {"student": student_rows, "teacher": teacher_rows}
        target = [row(heads[model], rows[model][view], factor) for factor, model, view in self.target]
        return self.divergence_loss(
            student_rows["image"],
            student_head,
            target,
            token_weights=objective.eta * self.scale * token_weights,
            target_ids=target_ids,
            policy=policy,
            **options,
        )

    def divergence_loss(self, rows: Tensor, head: Head, target: list[TargetRow], **options: Any) -> DivergenceOutput:
        """The preset's divergence of [N, D] hidden states to a target; options of ``fused_linear_divergence``."""
        knobs = dataclasses.asdict(self.divergence)
        return fused_linear_divergence(rows, head.weight, target, **knobs, **head.student_options, **options)


def row(head: Head, hidden: Tensor, coefficient: float | Tensor) -> TargetRow:
    """coefficient * logits of hidden states."""
    return head.target(hidden)._replace(coefficient=coefficient)


@dataclass(frozen=True)
class Steered(Preset):
    """Visual Gradient Steering: ``VGSObjective`` says which rows the target has and what else is added."""

    target: tuple[Addend, ...] = (TEACHER, Addend(1.0, "student", "text"), Addend(-1.0, "teacher", "text"))

    steered = True
    has_terms = True
    fixed_divergence = True
    own_settings = STEERING

    def needs_text(self, objective: VGSObjective) -> bool:
        return objective.needs_text

    def needs_text_gradient(self, objective: VGSObjective) -> bool:
        return objective.needs_text_gradient

    def needs_vds(self, objective: VGSObjective, split: bool) -> bool:
        # In one pass the loss finds its own threshold, which costs fewer products with the heads.
        return (objective.schedule == "adaptive" and objective.gamma > 0) or (objective.lam > 0 and split)

    def loss(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        **options: Any,
    ) -> DivergenceOutput | VGSOutput:
        views = [view for view in ("image", "text") if view in student_rows]
        rows = [[rows[view] for view in views] for rows in (student_rows, teacher_rows)]
        return fused_loss(*rows, student_head, teacher_head, **options)


class WithPrior(Preset):
    """What presets share that compose the steered target themselves.

    With q* constant, standard + gamma * visual is (1 + gamma) * KL(p_I || softmax(t + kappa * (prior - w))) and a
    constant, kappa = gamma / (1 + gamma), over the logits of the teacher, the prior and the text-only teacher.
    """

    fixed_divergence = True

    def steered_loss(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        prior: TargetRow | None,
        gamma: Tensor | None,
        weights: Tensor,
        **options: Any,
    ) -> DivergenceOutput:
        """The sum over tokens of weights [N] * (standard + gamma [N] * visual), but for that constant.

        Args:
            student_rows, teacher_rows, student_head, teacher_head: as of ``loss``.
            prior: its row; None, like gamma, for standard alone.
            gamma, weights: see the formula.
            **options: of ``fused_linear_divergence``.
        """
        target = [row(teacher_head, teacher_rows["image"], 1.0)]
        if gamma is not None:
            kappa = gamma / (1 + gamma)
            target += [prior._replace(coefficient=kappa), row(teacher_head, teacher_rows["text"], -kappa)]
            weights = weights * (1 + gamma)
        return self.divergence_loss(student_rows["image"], student_head, target, token_weights=weights, **options)

    def language_loss(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        weights: Tensor,
        **options: Any,
    ) -> DivergenceOutput:
        """The sum over tokens of weights [N] * KL(p_x || q_x)."""
        text = row(teacher_head, teacher_rows["text"], 1.0)
        return self.divergence_loss(student_rows["text"], student_head, [text], token_weights=weights, **options)


def shared_limits(vds: Tensor, objective: VGSObjective, trajectory_ids: Tensor) -> tuple[list[Tensor], Tensor | None]:
    """The VDS thresholds of known scores; collective for the scope ``"ranks"``.

    Args:
        vds: [N] visual dependency scores, nats; N may be 0.
        objective: gives the quantiles and their scope.
        trajectory_ids: [N] int64, see ``groups.trajectory_ids``.

    Returns:
        One [N] tensor for each of the K ``objective.quantiles``; and [K], to be given to the loss of any part of these
        tokens, or None where every trajectory has its own.
    """
    name = group_name(None) if objective.vds_scope == "ranks" else None
    limits = thresholds(vds, objective, trajectory_ids, name)
    if objective.vds_scope == "trajectory":
        return limits, None
    # A rank without tokens needs no threshold, but the loss must not ask the others for theirs.
    return limits, torch.stack([limit[0] if len(limit) else limit.new_zeros(()) for limit in limits])


def limits_of(
    vds: Tensor, objective: VGSObjective, trajectory_ids: Tensor | None, given: Tensor | None
) -> Sequence[Tensor]:
    """The thresholds of ``objective.quantiles``: given ones [K], or [N] each, of these tokens."""
    return thresholds(vds, objective, trajectory_ids) if given is None else list(given)


@dataclass
class LanguageOutput(DivergenceOutput):
    """With [N] KL(p_x || q_x), detached."""

    language: Tensor | None = None


@dataclass(frozen=True)
class LanguageSteered(WithPrior):
    """The counter-experiment: standard + gamma * language + lam * 1[vds > Q] * visual.

    The logged loss lacks the constant of ``WithPrior``; the logged divergence is its KL.
    """

    target: tuple[Addend, ...] = (TEACHER, Addend(1.0, "student", "text"), Addend(-1.0, "teacher", "text"))

    own_settings = frozenset({"gamma", "gamma_warmup_steps", "lam", "vds_quantile", "vds_scope", "lp_every"})

    def needs_text_gradient(self, objective: VGSObjective) -> bool:
        return objective.gamma > 0

    def needs_vds(self, objective: VGSObjective, split: bool) -> bool:
        return objective.lam > 0

    def loss(
        self,
        student_rows: Rows,
        teacher_rows: Rows,
        student_head: Head,
        teacher_head: Head,
        *,
        objective: VGSObjective,
        token_weights: Tensor,
        target_ids: Tensor | None = None,
        trajectory_ids: Tensor | None = None,
        policy: PolicyTerm | None = None,
        vds: Tensor | None = None,
        vds_threshold: Tensor | None = None,
        return_terms: bool = True,
        **options: Any,
    ) -> DivergenceOutput:
        weights, gamma = objective.eta * token_weights, None
        if objective.lam > 0:
            limit = limits_of(vds, objective, trajectory_ids, vds_threshold)[-1]
            gamma = objective.lam * (vds > limit).to(weights.dtype)
        prior = None if gamma is None else row(student_head, student_rows["text"], 1.0)
        sampled = {"target_ids": target_ids, "policy": policy}
        output = self.steered_loss(
            student_rows, teacher_rows, student_head, teacher_head, prior, gamma, weights, **sampled, **options
        )
        if objective.gamma == 0:
            return output
        weights = objective.gamma * weights
        language = self.language_loss(student_rows, teacher_rows, student_head, teacher_head, weights, **options)
        columns = {**vars(output), "loss": output.loss + language.loss}
        return LanguageOutput(**columns, language=language.divergence)
