"""VGSTrainer: Visual Gradient Steering on TRL's on-policy distillation trainer.

The host samples responses, batches, accumulates, logs, saves and resumes. A training step of this trainer is, in the
order of the methods below: sample -> teacher -> (measure eta) -> plan passes -> loss -> log. ``host_hooks`` says where
the host calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import ProcessorMixin, TrainerCallback
from trl import DistillationTrainer

from vgs_kernels import VGSObjective

from ..data.answers import answers_match
from ..data.degraded import control_groups
from ..errors import ConfigError
from ..models.groups import PromptGroup, response_lengths
from ..objectives.weighting import token_weights
from ..teachers.protocol import Teacher
from ..teachers.sources import TeacherSource, as_sources
from . import eta_measurement
from .batching import split_batch
from .checkpoints import check_writable
from .checks import check_processor
from .encoding import encode_ahead
from .host_hooks import HostHooks, check_signatures, repeat_prompts
from .instruments import add_instruments
from .micro_batch import MicroBatch, mean_left_out, mean_overlap
from .off_policy import Recorded, check_caches
from .passes import Outputs, loss_in_passes, means_to_log, note
from .preparation import prepare_models
from .prior import Prior
from .rollouts import rollout, samples_of
from .routes import itself, make_teachers, open_teachers, place_teachers, routes_of
from .settings import VGSConfig
from .step import StepScorer
from .term_bins import terms_by_bin


class VGSTrainer(HostHooks, DistillationTrainer):
    """On-policy distillation with Visual Gradient Steering (arXiv 2606.00564).

    Args:
        model: the student, a vision-language model (of presets that compare nothing with it: also a text-only one) or
            its id.
        teacher_model: the teacher, with the student's vocabulary and image tokens, or its id, or a ``TeacherSource``
            (a server, a cache); several by the names that stand in the column ``args.teacher_column``.
        args: a ``VGSConfig``.
        train_dataset, eval_dataset: samples with ``prompt`` (chat messages), ``images`` (list of PIL images; or TRL's
            ``image``) and, for the accuracy, ``answer`` (str); several evaluation sets as a dict by name.
        processing_class: the student's processor (a text-only model's tokenizer); None loads it.
        scorer: ``scorer(response_text, gold_answer) -> bool``; None compares the final answers
            (``vgs.data.answers.answers_match``).
        callbacks, optimizers, quantization_config, peft_config: as in TRL.
        tools: not supported.

    Attributes:
        teachers: the kinds of teacher (``vgs.objectives.presets.TEACHERS``) whose presets the trainer can run.
        placeholder_ids: image and video tokens, which are never sampled.
        opened: the teachers, by name. teacher_model: the one that runs here, if it is alone.
        anchor, packs: see ``StepScorer``.
        recorded: responses that the student has not sampled; None where it samples all.
        step_scorer: runs student and teacher.
        prior: the prior of q* where it has weights of its own; None where it is the student's at every step.
        steering, resume: see ``HostHooks``.

    Raises:
        TypeError: ``args`` is not a ``VGSConfig``, or ``processing_class`` is no processor.
        ConfigError: ``tools`` given, no teacher, different image tokens, a text-only model, eta measured on parameters
            that DeepSpeed or FSDP1 shards, or versions of TRL and transformers that do not fit.
    """

    teachers: tuple[str, ...] = ("separate",)
    extra_columns = ("answer", "responses")
    _tag_names = ("trl", "distillation", "vgs")
    _name = "VGS"
    _paper = MappingProxyType(
        {"title": "Decomposed On-Policy Distillation for Vision-Language Reasoning", "id": "2606.00564"}
    )

    def __init__(
        self,
        model: str | nn.Module,
        teacher_model: str | nn.Module | TeacherSource | Mapping[str, str | nn.Module | TeacherSource],
        args: VGSConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        scorer: Callable[[str, str], bool] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Sequence[Callable] | None = None,
    ) -> None:
        if not isinstance(args, VGSConfig):
            raise TypeError(f"args must be a VGSConfig, got {type(args).__name__}.")
        check_writable(args.output_dir)
        if tools:
            raise ConfigError("tools are not supported: a tool's reply has no text-only view. Pass tools=None.")
        if teacher_model is None and "separate" in self.teachers:
            raise ConfigError("teacher_model is needed: its hidden states with and without the image define the loss.")
        check_processor(processing_class)
        check_signatures(DistillationTrainer)  # before a model is loaded
        check_caches(as_sources(teacher_model), args.on_policy_fraction)
        opened = open_teachers(teacher_model, args)
        super().__init__(
            model=model,
            teacher_model=None,  # whose check of vocabularies would refuse heads of different padding
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        if args.num_generations > 1 and isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            raise ConfigError(
                f"num_generations={args.num_generations} needs a dataset with a length, got "
                f"{type(self.train_dataset).__name__}."
            )
        self.scorer = scorer or answers_match
        place_teachers(self, opened or itself(self.model))
        self.prior = None if args.prior == "live" else Prior(self, args.prior, args.prior_decay)
        prepare_models(self, self.teachers)
        self.recorded = None if args.on_policy_fraction == 1 else Recorded(self)
        head = None if self.prior is None else self.prior.head
        self.step_scorer = StepScorer(self.args, self.accelerator, self.make_teachers(), self.anchor, self.packs, head)
        add_instruments(self)
        if self.recorded is None:
            encode_ahead(self)

    def make_teachers(self) -> dict[str, Teacher]:
        """What a step asks, by name."""
        return make_teachers(self)

    @property
    def objective(self) -> VGSObjective:
        """The objective in force: gamma warmed up and guarded, eta as fixed or measured so far (before that 1, or where
        it is cheap that of two parallel gradients of one length), lam as due. Evaluation takes gamma and lam as set."""
        args, gamma, eta = self.args, self.args.gamma, self.args.fixed_eta
        if self.model.training:
            gamma = self.steering.gamma(args, self.state.global_step)
        if eta is None:
            unknown = 1 / (1 + args.gamma) if args.eta == "cheap" else 1.0
            eta = self.steering.eta_at(args.eta, gamma / args.gamma, unknown)
        objective, every = args.objective(eta, gamma), args.lp_every
        if not self.model.training or every == 1:
            return objective
        return replace(objective, lam=0.0 if self.state.global_step % every else every * objective.lam)

    @property
    def scores_samples(self) -> bool:
        """Whether there is a teacher for what the student samples; else evaluation has an accuracy and no loss."""
        return all(found.source.live for found in self.opened.values())

    # ---- a training step

    def next_micro_batch(self, generation_batch: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``compute_loss`` takes next: ``groups``, ``teacher`` and ``num_items_in_batch``.

        All micro-batches of an optimizer step are sampled together, and scored by the teacher before the student moves.

        Args:
            generation_batch: samples, one per response: of an optimizer step in training, of a batch in evaluation.
        """
        if not self.model.training:
            batch = self.sample(generation_batch)
            return self.with_teacher(batch) if self.scores_samples else {**batch, "teacher": None}
        steps = self.args.gradient_accumulation_steps
        position = self._step % steps
        if position == 0 or self._buffered_inputs is None:
            with self.clock.phase("sampling"):
                batch = self.sample(generation_batch)
            with self.clock.phase("teacher"):
                batch = self.with_teacher(batch)
            self._buffered_inputs = split_batch(batch, steps, ("teacher",))
            if eta_measurement.is_due(self):
                with self.clock.phase("eta"):
                    self.measure_eta(self._buffered_inputs)
        return self._buffered_inputs[position]

    def sample(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The student's responses: ``groups`` (prompts with theirs), further ``views`` of them, ``routes`` (the names
        of their teachers), and ``num_items_in_batch``, what the loss is a mean of.

        Args:
            inputs: samples, one per response; in training those to one prompt follow each other.
        """
        count = self.args.num_generations if self.model.training else 1
        if self.recorded is None or not self.model.training:
            _, groups = rollout(self, inputs, count)
        else:
            groups = self.recorded.rollout(inputs, count)
        # What the host divides by, tokens; or responses instead.
        lengths = response_lengths(groups)
        number = sum(lengths) if self.args.loss_reduction == "token" else sum(length > 0 for length in lengths)
        items = self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).sum()
        samples = samples_of(inputs, groups)
        routes = routes_of(samples, self.args.teacher_column, list(self.opened))
        views = self.further_views(samples, groups)
        return {"groups": groups, "views": views, "routes": routes, "num_items_in_batch": items}

    def further_views(self, samples: list[dict[str, Any]], groups: list[PromptGroup]) -> dict[str, list[PromptGroup]]:
        """The views that the preset needs beyond ``"image"`` and ``"text"``, with the responses of ``groups``.

        Args:
            samples: one per group.
            groups: prompts with their responses, in the same order.
        """
        preset = self.args.preset_in_force
        if "control" not in preset.views:
            return {}
        kind, options = self.args.control_kind or preset.control, self.chat_template_kwargs
        return {"control": control_groups(self.processing_class, samples, groups, kind, self.args.seed, **options)}

    def with_teacher(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A sampled batch with ``teacher``, what the teacher (and a prior of its own) says of each response, in place
        of the ``views``. Whatever gamma is in force, this serves the one that is set."""
        objective, groups = replace(self.objective, gamma=self.args.gamma), batch["groups"]
        text = self.step_scorer.needs_text(objective)
        views, routes = batch.get("views", {}), batch.get("routes")
        teacher = self.step_scorer.score_teacher(groups, objective, text, views, routes)
        if self.prior is not None and objective.gamma > 0:
            teacher = self.prior.add_rows(self.step_scorer, groups, teacher)
        return {"groups": groups, "teacher": teacher, "num_items_in_batch": batch["num_items_in_batch"]}

    def measure_eta(self, micro_batches: list[dict[str, Any]]) -> None:
        """One measurement of eta on all micro-batches of this optimizer step: ``eta_measurement.measure``."""
        eta_measurement.measure(self, micro_batches)

    def plan_passes(
        self, inputs: dict[str, Any], num_items: Tensor | float | None, objective: VGSObjective, terms: bool
    ) -> MicroBatch:
        """A micro-batch with its tokens' weights, and which responses run together.

        Args:
            inputs: from ``next_micro_batch``.
            num_items: tokens or responses that the loss is a mean of; None for those of ``inputs``.
            objective: of this step.
            terms: whether the terms of every token are wanted, for the log.
        """
        lengths = response_lengths(inputs["groups"])
        weights = token_weights(lengths, self.args.loss_reduction, num_items, self.accelerator.device)
        return self.step_scorer.micro_batch(inputs["groups"], inputs["teacher"], weights, objective, terms)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch. All its passes but the last have gone backward already when it returns."""
        num_items = None
        if inputs["teacher"] is None:
            loss = torch.full((), math.nan, device=self.accelerator.device)
            return (loss, None) if return_outputs else loss
        if self.model.training:  # per process: gradients are averaged over processes
            num_items = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        batch = self.plan_passes(inputs, num_items, self.objective, self.args.log_terms)
        if self.model.training and self.args.fixed_eta is None and self.args.eta == "cheap" and batch.objective.gamma:
            batch = replace(batch, norms=[])
        loss, outputs = loss_in_passes(self.step_scorer, model, batch, self.model.training)
        self.log_terms(batch, outputs)
        return (loss, None) if return_outputs else loss

    def log_terms(self, batch: MicroBatch, outputs: Outputs) -> None:
        """Adds a micro-batch to the metrics and, in training, to what is watched for collapse."""
        means = means_to_log(self.accelerator, outputs, batch.objective, self.args)
        means |= mean_overlap(self.accelerator, batch, self.args.log_overlap)
        means |= terms_by_bin(self.accelerator, outputs, self.args.log_terms_by_bin)
        if self.model.training and self.args.gradient_tolerance > 0:
            means |= mean_left_out(self.accelerator, outputs)
        note(self, means)
        if batch.norms is not None:
            eta_measurement.note_norms(self, batch)

    # ---- what the host asks

    def train_sampler(self, sampler: Sampler) -> Sampler:
        """The host's, with every prompt ``num_generations`` times in a row."""
        return repeat_prompts(sampler, self.args.num_generations)
