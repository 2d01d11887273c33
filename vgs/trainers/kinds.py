"""Which trainer and settings a run's config asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..objectives.presets import Preset


def _distillation() -> tuple[type, type]:
    from .distillation import VGSTrainer
    from .settings import VGSConfig

    return VGSConfig, VGSTrainer


def _self_distillation() -> tuple[type, type]:
    from .self_distillation import SelfDistillationConfig, SelfDistillationTrainer

    return SelfDistillationConfig, SelfDistillationTrainer


def _reinforcement() -> tuple[type, type]:
    from .grpo import VGSGRPOConfig, VGSGRPOTrainer

    return VGSGRPOConfig, VGSGRPOTrainer


#: Kind of a run -> its classes of settings and trainer.
TRAINERS = {"distillation": _distillation, "self": _self_distillation, "grpo": _reinforcement}


def preset_of(config: Mapping[str, Any]) -> Preset:
    """What a config minimises: its ``objective``, else ``training.preset``, else ``"vgs"``.

    Raises:
        ConfigError: an unknown name, or two that differ.
    """
    from ..objectives.presets import find_preset

    training = config.get("training")
    named = training.get("preset") if isinstance(training, Mapping) else None
    if config.get("objective") is None:
        return find_preset("vgs" if named is None else named, "training.preset")
    preset = find_preset(config["objective"], "objective")
    if named is not None and find_preset(named, "training.preset") is not preset:
        raise ConfigError(f"objective {preset.name!r} and training.preset {named!r} differ; keep one.")
    return preset


def trainer_kind(config: Mapping[str, Any]) -> str:
    """Which of ``TRAINERS`` a config asks for: with ``trainer: grpo`` that one, else what its objective needs.

    Raises:
        ConfigError: another ``trainer``, or as ``preset_of``.
    """
    trainer, preset = config.get("trainer"), preset_of(config)
    if trainer not in (None, "grpo"):
        raise ConfigError(f"trainer must be 'grpo' or left out, got {trainer!r}.")
    if trainer is not None:
        return trainer
    return "distillation" if preset.teacher == "separate" else "self"


def teacher_sections(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The sections of a run's teachers, by name; one alone has the name ""; none where it has no teacher.

    Args:
        config: of ``load_config``.
    """
    if not needs_teacher(config):
        return {}
    return dict(config["teachers"]) if "teachers" in config else {"": config["teacher"]} if "teacher" in config else {}


def needs_teacher(config: Mapping[str, Any]) -> bool:
    """Whether a run has another model to learn from; not where it is its own teacher, and not in GRPO alone."""
    kind = trainer_kind(config)
    return kind != "self" and not (kind == "grpo" and (config.get("training") or {}).get("alpha") == 0)
