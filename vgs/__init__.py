"""Visual Gradient Steering (arXiv 2606.00564): on-policy distillation of vision-language models.

Importing this package is cheap: torch, transformers and TRL are imported when a name is first used. All but the
trainers and the data need no TRL, accelerate, datasets or PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    # the method for one batch, and its parts, for a loop of one's own
    "vgs_step": "one_step",
    "PromptGroup": "models.groups",
    "encode_groups": "data.prompts",
    "anchor_group": "data.prompts",
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
    "load_samples": "data.sources",
    "answers_match": "data.answers",
    "score_responses": "evaluation.token_terms",
    "evaluate_accuracy": "evaluation.accuracy",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
