"""A run's YAML file and its overrides: read, checked against what is known, and filled in from its objective."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, config_errors
from ..trainers.kinds import TRAINERS, needs_teacher, preset_of, trainer_kind

NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 reads 1e-6 as text
MODEL_KEYS = ("path", "revision", "dtype", "attn_implementation", "trust_remote_code")
SECTIONS = ("task", "trainer", "objective", "student", "teacher", "processor", "data", "digits", "training", "lora")
TEACHER_KEYS = (*MODEL_KEYS, "load_in_8bit")
# Settings of the host's that `vgs` takes from another place.
ELSEWHERE = {
    "resume_from_checkpoint": "--resume",
    "model_init_kwargs": "section student",
    "teacher_model_init_kwargs": "section teacher",
}
DIGITS_KEYS = ("cache", "teacher_seed", "student_seed", "train_size", "eval_size", "data_seed", "context")


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a misspelt key, with the nearest valid name.

    Args:
        key: as it came.
        known: the valid keys.
        where: they are, for the message, e.g. ``"section 'student'"``.
    """
    known = sorted(known)
    nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(known)}."
    if key in ELSEWHERE:
        hint = f"use {ELSEWHERE[key]}."
    return ConfigError(f"Unknown key {key!r} in {where}; {hint}")


def _schema(config: Mapping[str, Any]) -> dict[str, Any]:
    """Section -> its keys; None where there are none, or they belong to another library."""
    from ..data.sources import DataSource

    settings, _ = TRAINERS[trainer_kind(config)]()
    source = [field.name for field in dataclasses.fields(DataSource)]
    return {
        "task": None,
        "trainer": None,
        "objective": None,
        "student": MODEL_KEYS,
        "teacher": TEACHER_KEYS,
        "processor": None,
        "data": {"train": source, "eval": source},
        "digits": DIGITS_KEYS,
        "training": [
            field.name for field in dataclasses.fields(settings) if field.init and field.name not in ELSEWHERE
        ],
        "lora": None,
    }


def _check(config: Any, schema: Any, where: str) -> None:
    if schema is None:
        return
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} must be a section of keys, got {config!r}.")
    for key, value in config.items():
        if key not in schema:
            raise unknown_key(key, schema, where)
        if isinstance(schema, Mapping):
            _check(value, schema[key], f"section {key!r}")


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _overrides(arguments: Sequence[str]) -> list[tuple[list[str], Any]]:
    """``--section.key value`` and ``--key=value``; a key that is no section belongs to ``training``."""
    pending, result = list(arguments), []
    while pending:
        option = pending.pop(0)
        if not option.startswith("--"):
            raise ConfigError(f"Expected --key value, got {option!r}.")
        key, separator, value = option[2:].partition("=")
        if not separator:
            if not pending:
                raise ConfigError(f"--{key} needs a value.")
            value = pending.pop(0)
        path = key.split(".") if "." in key or key in SECTIONS else ["training", key]
        with config_errors(f"--{key} is not YAML", yaml.YAMLError):
            result.append((path, yaml.safe_load(value) if value else ""))
    return result


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and check a run's YAML file.

    Args:
        path: the file; relative dataset and model paths in it start at the working directory.
        overrides: command-line arguments such as ``["--learning_rate", "1e-5", "--data.train.limit=64"]``.

    Raises:
        ConfigError: no such file, no YAML in it, an unknown key or objective (the nearest valid one is named), or a
            missing section.
    """
    with config_errors(f"config {str(path)!r} cannot be read", OSError, UnicodeDecodeError):
        text = Path(path).read_text()
    with config_errors(f"{path} is not YAML", yaml.YAMLError):
        config = yaml.safe_load(text) or {}
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold sections of keys, got {type(config).__name__}.")
    for keys, value in _overrides(overrides):
        section = config
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ConfigError(f"--{'.'.join(keys)}: {key!r} is not a section of keys.")
        section[keys[-1]] = value
    _check(config, _schema(config), str(path))
    if config.get("task") not in (None, "digits"):
        raise ConfigError(f"task must be 'digits' or left out, got {config['task']!r}.")
    for part, section in (config.get("data") or {}).items():
        if "path" not in section:
            raise ConfigError(f"{path} needs data.{part}.path.")
    if config.get("task") is None:
        needed = [("student", "path"), ("teacher", "path"), ("data", "train")]
        if not needs_teacher(config):
            needed.remove(("teacher", "path"))
        for section, key in needed:
            if key not in config.get(section, {}):
                raise ConfigError(f"{path} needs {section}.{key} (or task: digits).")
    return _with_objective(_with_strategies(_numbers(config)))


def _with_objective(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the settings that its objective recommends, where it leaves them open."""
    training = config.get("training") or {}
    if config.get("objective") is None and training.get("preset") is None:
        return config
    preset = preset_of(config)
    settings = {} if trainer_kind(config) == "grpo" else preset.settings  # reinforcement has its own
    return {**config, "training": {**settings, **training, "preset": preset.name}}


def _with_strategies(config: dict[str, Any]) -> dict[str, Any]:
    """YAML reads a bare ``no`` as False, where ``eval_strategy`` and its like mean the word."""
    training = config.get("training") or {}
    words = {key: "no" for key, value in training.items() if key.endswith("_strategy") and value is False}
    return {**config, "training": {**training, **words}} if words else config
