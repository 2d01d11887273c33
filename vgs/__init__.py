"""Visual Gradient Steering (arXiv 2606.00564): on-policy distillation of vision-language models.

Importing this package is cheap: torch, transformers and TRL are imported when a name is first used. All but the
trainers and the data need no TRL, accelerate, datasets or PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for type checkers, editors and the reference
    from .data.answers import answers_match as answers_match
    from .data.prompts import anchor_group as anchor_group
    from .data.prompts import encode_groups as encode_groups
    from .data.sources import DataSource as DataSource
    from .data.sources import load_samples as load_samples
    from .errors import ConfigError as ConfigError
    from .evaluation.accuracy import evaluate_accuracy as evaluate_accuracy
    from .evaluation.sampling import respond as respond
    from .evaluation.token_terms import describe_responses as describe_responses
    from .evaluation.token_terms import score_responses as score_responses
    from .models.families import placeholder_ids as placeholder_ids
    from .models.forward import fused_loss as fused_loss
    from .models.forward import score_groups as score_groups
    from .models.forward import score_with_anchor as score_with_anchor
    from .models.groups import PromptGroup as PromptGroup
    from .models.groups import response_lengths as response_lengths
    from .models.groups import trajectory_ids as trajectory_ids
    from .models.heads import read_head as read_head
    from .models.heads import whole_heads as whole_heads
    from .models.wrappers import run_inside as run_inside
    from .models.wrappers import unwrap as unwrap
    from .objectives.definitions import Preset as Preset
    from .objectives.presets import PRESETS as PRESETS
    from .objectives.presets import find_preset as find_preset
    from .objectives.weighting import token_weights as token_weights
    from .one_step import vgs_step as vgs_step
    from .teachers.sources import TeacherSource as TeacherSource
    from .trainers.distillation import VGSTrainer as VGSTrainer
    from .trainers.grpo import VGSGRPOTrainer as VGSGRPOTrainer
    from .trainers.grpo_settings import VGSGRPOConfig as VGSGRPOConfig
    from .trainers.self_distillation import SelfDistillationConfig as SelfDistillationConfig
    from .trainers.self_distillation import SelfDistillationTrainer as SelfDistillationTrainer
    from .trainers.settings import VGSConfig as VGSConfig

_EXPORTS = {
    # the method for one batch, and its parts, for a loop of one's own
    "vgs_step": "one_step",
    "PromptGroup": "models.groups",
    "encode_groups": "data.prompts",
    "anchor_group": "data.prompts",
    "respond": "evaluation.sampling",
    "placeholder_ids": "models.families",
    "response_lengths": "models.groups",
    "trajectory_ids": "models.groups",
    "score_groups": "models.forward",
    "score_with_anchor": "models.forward",
    "read_head": "models.heads",
    "whole_heads": "models.heads",
    "fused_loss": "models.forward",
    "run_inside": "models.wrappers",
    "unwrap": "models.wrappers",
    # what is minimised
    "PRESETS": "objectives.presets",
    "Preset": "objectives.definitions",
    "find_preset": "objectives.presets",
    "token_weights": "objectives.weighting",
    # trainers on TRL's
    "VGSConfig": "trainers.settings",
    "VGSTrainer": "trainers.distillation",
    "SelfDistillationConfig": "trainers.self_distillation",
    "SelfDistillationTrainer": "trainers.self_distillation",
    "VGSGRPOConfig": "trainers.grpo_settings",
    "VGSGRPOTrainer": "trainers.grpo",
    "TeacherSource": "teachers.sources",
    "ConfigError": "errors",
    # data and evaluation
    "DataSource": "data.sources",
    "load_samples": "data.sources",
    "answers_match": "data.answers",
    "score_responses": "evaluation.token_terms",
    "describe_responses": "evaluation.token_terms",
    "evaluate_accuracy": "evaluation.accuracy",
}
__all__ = list(_EXPORTS)


if not TYPE_CHECKING:  # to which every name would exist

    def __getattr__(name: str) -> Any:
        if name in _EXPORTS:
            return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
