"""Visual Gradient Steering (arXiv 2606.00564): on-policy distillation of vision-language models.

Importing this package is cheap: torch, transformers and TRL are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "VGSConfig": "trainers.settings",
    "VGSTrainer": "trainers.distillation",
    "SelfDistillationConfig": "trainers.self_distillation",
    "SelfDistillationTrainer": "trainers.self_distillation",
    "VGSGRPOConfig": "trainers.grpo_settings",
    "VGSGRPOTrainer": "trainers.grpo",
    "load_samples": "data.sources",
    "answers_match": "data.answers",
    "evaluate_accuracy": "evaluation.accuracy",
    "PromptGroup": "models.groups",
    "encode_groups": "data.prompts",
    "score_groups": "models.forward",
    "score_responses": "evaluation.token_terms",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
