"""What reinforcement learning needs of a step: log-probabilities, token weights, and a loss without a teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vgs_kernels import DivergenceOutput, TargetRow, VGSObjective, VGSOutput, fused_linear_divergence

from ..models.groups import PromptGroup, response_lengths, select_responses
from ..models.heads import Head, read_head, token_logps, whole_heads
from ..models.wrappers import run_inside
from ..objectives.presets import PRESETS, Preset
from ..teachers.protocol import TeacherRows
from .micro_batch import NO_VIEWS, MicroBatch, Views, sampled_tokens
from .step import StepScorer

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


def policy_weights(loss_type: str, lengths: Sequence[int], longest: int, tokens: Tensor) -> list[Tensor]:
    """0-d float32 for every response of a micro-batch: the weight of its tokens in TRL's policy loss.

    Args:
        loss_type: ``"grpo"``: mean over a response, then over responses; ``"bnpo"``: over the micro-batch's tokens;
            ``"dr_grpo"``: over as many tokens as responses could have; ``"dapo"``: over the tokens of a whole optimizer
            step.
        lengths: of the responses. Those of length 0 count as responses.
        longest: of any response, ``max_completion_length``.
        tokens: of the optimizer step, on one process.
    """
    count = len(lengths)
    if loss_type == "grpo":
        divisors = [count * max(length, 1) for length in lengths]
    elif loss_type == "bnpo":
        divisors = [max(sum(lengths), 1)] * count
    elif loss_type == "dr_grpo":
        divisors = [count * longest] * count
    else:
        divisors = [tokens] * count
    return [1.0 / torch.as_tensor(divisor, dtype=torch.float32, device=tokens.device) for divisor in divisors]


def clip_ratios(accelerator: Accelerator, batch: MicroBatch, outputs: Sequence[Any]) -> dict[str, float]:
    """How many tokens the policy term clips, under TRL's names; over all ranks.

    Args:
        accelerator: knows the processes.
        batch: with a policy.
        outputs: of its passes.
    """
    lengths = response_lengths(batch.groups)
    low: list[Tensor] = [torch.empty(0)] * len(lengths)
    high = list(low)
    for chosen, output in zip(batch.passes, outputs, strict=True):
        parts = output.target_logps.split([lengths[index] for index in chosen])
        for index, logps in zip(chosen, parts, strict=True):
            term = batch.policy[index]
            old = logps if term.old_logps is None else term.old_logps
            ratio, advantages = (logps - old.to(logps.device)).exp(), term.advantages.to(logps.device)
            low[index] = ((ratio < 1 - term.epsilon_low) & (advantages < 0)).float()
            high[index] = ((ratio > 1 + term.epsilon_high) & (advantages > 0)).float()
    sums = torch.stack([torch.cat(low).sum(), torch.cat(high).sum()])
    totals = accelerator.reduce(torch.cat([sums, sums.new_tensor([sum(lengths)])]), reduction="sum")
    lowest, highest = (accelerator.gather(torch.stack([x.mean() for x in column])) for column in (low, high))
    low_mean, high_mean = (totals[:2] / totals[2].clamp(min=1)).tolist()
    return {
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/region_mean": low_mean + high_mean,
        "clip_ratio/low_min": min(_numbers(lowest), default=math.nan),
        "clip_ratio/high_max": max(_numbers(highest), default=math.nan),
    }


def _numbers(means: Tensor) -> list[float]:
    """Those of responses that have tokens."""
    return means[~means.isnan()].tolist()


@dataclass
class PolicyScorer(StepScorer):
    """A step's scorer that also gives the student's log-probabilities.

    The policy term has the temperature of sampling. Where the distillation has another, it costs one more product with
    the student's head.
    """

    @property
    def _apart(self) -> bool:
        return self.args.temperature_of_loss != self.args.temperature

    def _sampled(self, batch: MicroBatch, chosen: list[int], like: Tensor) -> dict[str, Any]:
        options = super()._sampled(batch, chosen, like)
        return {name: x for name, x in options.items() if name != "policy"} if self._apart else options

    def _with_policy(
        self, output: VGSOutput | DivergenceOutput, batch: MicroBatch, chosen: list[int], rows: Tensor, head: Head
    ) -> VGSOutput | DivergenceOutput:
        if batch.policy is None or not self._apart:
            return output
        alone = self._policy_alone(batch, chosen, rows, head)
        return replace(output, loss=output.loss + alone.loss, policy=alone.policy, target_logps=alone.target_logps)

    def _policy_alone(self, batch: MicroBatch, chosen: list[int], rows: Tensor, head: Head) -> DivergenceOutput:
        """The policy term without any distillation, at the temperature of sampling."""
        return fused_linear_divergence(
            rows,
            head.weight,
            [_flat_target(rows, head)],
            token_weights=rows.new_zeros(len(rows), dtype=torch.float32),
            temperature=self.args.temperature,
            **batch.sampled(chosen, rows),
            **head.student_options,
            **self._loss_options,
        )

    @torch.no_grad()
    def student_logps(self, model: nn.Module, groups: list[PromptGroup]) -> list[Tensor]:
        """[T] log-probabilities of the sampled tokens under the student as it is, for every response.

        Args:
            model: the student as prepared by the accelerator.
            groups: prompts with their responses; text-only prompts are not read.
        """
        student = self.accelerator.unwrap_model(model)
        found: dict[int, Tensor] = {}
        with self.accelerator.autocast():
            passes = self.rollout_passes(groups)
            for chosen in self._equal(passes) if self.accelerator.num_processes > 1 else passes:
                part = select_responses(groups, chosen)
                _, logps = run_inside(model, partial(self._logps, student, part))
                found |= dict(zip(chosen, logps.split(response_lengths(part)), strict=True))
        return [found[index] for index in sorted(found)]

    def _logps(self, student: nn.Module, groups: list[PromptGroup]) -> tuple[None, Tensor]:
        together = self.accelerator.num_processes > 1
        (rows,), _ = self._rows(student, groups, text=False, text_gradient=False, together=together)
        with whole_heads(student):
            head = read_head(student, rows.dtype)
            rows = rows.to(head.weight.device)
            ids = sampled_tokens(groups, rows)
            return None, token_logps(rows, ids, head, self.args.temperature, **self._loss_options)


def _flat_target(rows: Tensor, head: Head) -> TargetRow:
    """Logits that are all 0, for next to no work: a loss that is nothing but a policy term needs some target."""
    width = 8
    return TargetRow(1.0, rows.new_zeros(len(rows), width), head.weight.new_zeros(len(head.weight), width))


@dataclass
class LonePolicyScorer(PolicyScorer):
    """Without a teacher: its loss is the policy term alone."""

    @property
    def preset(self) -> Preset:
        return PRESETS["opd"]  # no further view, and nothing to log of one

    def score_teacher(
        self,
        groups: list[PromptGroup],
        objective: VGSObjective,
        text: bool,
        views: Views = NO_VIEWS,
        routes: Sequence[str] | None = None,
    ) -> list[TeacherRows]:
        return [TeacherRows({}) for _ in response_lengths(groups)]

    def pass_loss(
        self, student: nn.Module, batch: MicroBatch, chosen: list[int]
    ) -> tuple[Tensor, VGSOutput | DivergenceOutput]:
        groups, together = select_responses(batch.groups, chosen), self.accelerator.num_processes > 1
        with self.accelerator.autocast():
            (rows,), zero = self._rows(student, groups, text=False, text_gradient=False, together=together)
            with whole_heads(student):
                head = read_head(student, rows.dtype)
                output = self._policy_alone(batch, chosen, rows.to(head.weight.device), head)
        return output.loss if zero is None else output.loss + zero, replace(output, divergence=None)
