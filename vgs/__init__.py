"""Visual Gradient Steering (arXiv 2606.00564): on-policy distillation of vision-language models.

Importing this package is cheap: torch, transformers and TRL are imported when a name is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "VGSConfig": "config",
    "VGSTrainer": "trainer",
    "SelfDistillationConfig": "opsd",
    "SelfDistillationTrainer": "opsd",
    "VGSGRPOConfig": "grpo_config",
    "VGSGRPOTrainer": "grpo",
    "load_samples": "data",
    "answers_match": "data",
    "evaluate_accuracy": "evaluation",
    "PromptGroup": "groups",
    "encode_groups": "pairing",
    "score_groups": "scoring",
    "score_responses": "scoring",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
