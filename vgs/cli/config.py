"""A run's YAML file and its overrides: read, every key checked, and filled in from its objective.

In memory a config is one dict of sections (``keys.SECTIONS``) beside ``objective``, ``trainer``, ``task`` and
``scorer``; every value in it has the type of its key, and nothing in it is without effect.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, config_errors
from ..log import warn_once
from ..trainers.kinds import needs_teacher, preset_of, teacher_sections, trainer_kind
from .keys import DATA, SECTIONS, TOP, Key, all_keys, unknown_key
from .typed import typed
from .yaml_text import read_yaml

logger = logging.getLogger(__name__)

FILE_KEYS = (*TOP, *SECTIONS)
OF_DIGITS = ("student", "teacher", "teachers", "processor", "data")  # sections that the built-in task brings itself


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
        path = key.split(".") if "." in key or key in FILE_KEYS else ["training", key]
        result.append((path, read_yaml(value, f"--{key}") if value else ""))
    return result


def _section(config: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        raise ConfigError(f"{where} must be a section of keys, got {config!r}.")
    return config


def _checked(section: Any, keys: Mapping[str, Key], where: str) -> dict[str, Any]:
    """A section with known keys and values of their types; null where a key takes none is as if it were left out."""
    checked = {}
    for name, value in _section(section, f"section {where.split('.')[-1]!r}").items():
        if name not in keys:
            raise unknown_key(name, keys, f"section {where.split('.')[-1]!r}")
        value = typed(value, keys[name], f"{where}.{name}")
        if value is not None or keys[name].takes_null:
            checked[name] = value
    return checked


def _top(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The file's own keys, and which sections there are; one that is empty counts as left out."""
    found = {}
    for key, value in config.items():
        if key not in FILE_KEYS:
            raise unknown_key(key, FILE_KEYS, name)
        if value is None:
            continue
        if key in SECTIONS:
            _section(value, f"section {key!r}")
        found[key] = value
    for key in ("objective", "trainer"):  # each with a list of names in its message
        if key in found and not isinstance(found[key], str):
            trainer_kind({key: found[key]})
    if found.get("task") not in (None, "digits"):
        raise ConfigError(f"task must be 'digits' or left out, got {found['task']!r}.")
    return found


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and check a run's YAML file.

    Args:
        path: the file; relative dataset and model paths in it start at the working directory.
        overrides: command-line arguments such as ``["--learning_rate", "1e-5", "--data.train.limit=64"]``.

    Raises:
        ConfigError: no such file, no YAML in it, a key that stands twice, an unknown key or objective (the nearest
            valid one is named), a value of another type than its key's, a section or key without effect, or a missing
            one.
    """
    with config_errors(f"config {str(path)!r} cannot be read", OSError, UnicodeDecodeError):
        text = Path(path).read_text()
    config = read_yaml(text, str(path))
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold sections of keys, got {type(config).__name__}.")
    override(config, overrides)
    return check_config(config, str(path))


def override(config: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put command-line arguments into the content of a YAML file.

    Args:
        config: changed in place. overrides: as of ``load_config``.

    Raises:
        ConfigError: an argument without a value, or a key below one that is no section.
    """
    for keys, value in _overrides(overrides):
        section = config
        for key in keys[:-1]:
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise ConfigError(f"--{'.'.join(keys)}: {key!r} is not a section of keys.")
        section[keys[-1]] = value


def check_config(config: Mapping[str, Any], name: str = "the config") -> dict[str, Any]:
    """A config in its one form, checked.

    Args:
        config: the content of a YAML file.
        name: of it, for the messages.

    Raises:
        ConfigError: as ``load_config``.
    """
    config = _top(config, name)
    kind = trainer_kind(config)
    keys = all_keys(kind)
    _move_teacher_column(config)
    if "rewards" in config:
        if "rewards" in config.get("training", {}):
            raise ConfigError("rewards and training.rewards are the same key; keep one.")
        if kind != "grpo":
            raise ConfigError("rewards has no effect without trainer: grpo.")
        config["training"] = {**config.get("training", {}), "rewards": config.pop("rewards")}
    if isinstance(rewards := config.get("training", {}).get("rewards"), str):
        config["training"] = {**config["training"], "rewards": [rewards]}
    for section in ("student", "teacher", "digits", "training", "lora"):
        if section in config:
            config[section] = _checked(config[section], keys[section], section)
    if "teachers" in config:
        config["teachers"] = {
            name: _checked(section, keys["teacher"], f"teachers.{name}") for name, section in config["teachers"].items()
        }
    if "data" in config:
        parts = _data_parts(config["data"])
        config["data"] = {part: _checked(section, DATA, f"data.{part}") for part, section in parts.items()}
    _check_effect(config, kind)
    _check_needed(config, name)
    _check_names(config)
    return _with_objective(config)


def _move_teacher_column(config: dict[str, Any]) -> None:
    """``teacher_column`` beside the sections is a setting of the training."""
    column = config.pop("teacher_column", None)
    training = config.get("training", {})
    if column is None:
        return
    if not isinstance(column, str):
        raise ConfigError(f"teacher_column must be a text, got {column!r}.")
    if "teacher_column" in training:
        raise ConfigError("teacher_column and training.teacher_column are the same key; keep one.")
    config["training"] = {**training, "teacher_column": column}


def _check_teachers(config: Mapping[str, Any], name: str) -> None:
    """Every teacher comes from somewhere, and its keys belong to where it comes from."""
    if "teacher" in config and "teachers" in config:
        raise ConfigError("sections 'teacher' and 'teachers' exclude each other; keep one.")
    column = config.get("training", {}).get("teacher_column")
    if ("teachers" in config) != (column is not None):
        raise ConfigError(
            "section 'teachers' and teacher_column, the column that names each row's teacher, need each other; got "
            f"{'the section' if column is None else f'teacher_column {column!r}'} alone."
        )
    for title, section in teacher_sections(config).items():
        where = f"teachers.{title}" if title else "teacher"
        if not {"path", "url", "cache"} & set(section):
            raise ConfigError(
                f"{name} needs {where}.path (or a url, or a cache{'' if title else '; or task: digits'})."
            )
        if "path" in section and "url" in section:
            raise ConfigError(f"{where}.path and {where}.url exclude each other; keep one.")
        of_path = sorted(set(section) - {"path", "url", "token_file", "cache"})
        if of_path and "path" not in section:
            raise ConfigError(f"{where}.{of_path[0]} has no effect without {where}.path; leave it out.")
        if "token_file" in section and "url" not in section:
            raise ConfigError(f"{where}.token_file has no effect without {where}.url; leave it out.")


def _data_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """``"train"``, ``"eval"`` and, of several sets to evaluate on, ``"eval.NAME"`` -> its section."""
    parts: dict[str, Any] = {}
    for part, section in data.items():
        if part not in ("train", "eval") and not part.startswith("eval."):
            raise unknown_key(part, ("train", "eval"), "section 'data'")
        several = part == "eval" and isinstance(section, Mapping) and not set(section) & set(DATA)
        if several and section and all(isinstance(each, Mapping) for each in section.values()):
            parts |= {f"eval.{name}": each for name, each in section.items()}
        else:
            parts[part] = section
    if "eval" in parts and len(eval_parts(parts)) > 1:
        raise ConfigError("data.eval must be one set, or several by name, got both.")
    return parts


def eval_parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> what belongs to each set to evaluate on, of a mapping by part of the data; a single set has the name "".

    Args:
        data: by ``"train"``, ``"eval"`` and ``"eval.NAME"``.
    """
    return {part[len("eval.") :]: each for part, each in data.items() if part.split(".")[0] == "eval"}


def _check_effect(config: Mapping[str, Any], kind: str) -> None:
    """Stop at what would change nothing."""
    from ..objectives.definitions import SETTINGS
    from ..objectives.presets import find_preset

    digits = config.get("task") == "digits"
    for section in OF_DIGITS if digits else ("digits",):
        if section in config:
            hint = "with task: digits, which brings its own" if digits else "without task: digits"
            raise ConfigError(f"section {section!r} has no effect {hint}; leave it out.")
    preset, training = preset_of(config), config.get("training", {})
    given = [section for section in ("teacher", "teachers") if section in config]
    if kind == "self" and given:
        raise ConfigError(
            f"section {given[0]!r} has no effect with objective {preset.name!r}, whose teacher is the student itself; "
            "leave it out (training.teacher says how it follows the student)."
        )
    if kind == "grpo" and training.get("alpha") == 0 and given:
        warn_once(logger, f"section {given[0]} has no effect with alpha 0: nothing is distilled.")
    unread = [key for key in sorted(SETTINGS) if key in training and not preset.reads(key)]
    if kind != "grpo" and preset.name != "gkd" and training.get("beta") is not None:
        unread = ["beta", *unread]
    if unread:
        readers = [name for name in ("vgs", "vcsd", "gkd") if name == "gkd" or find_preset(name).reads(unread[0])]
        reader = "gkd" if unread[0] == "beta" else readers[0]
        raise ConfigError(
            f"training.{unread[0]} has no effect with objective {preset.name!r} (it belongs to {reader!r}, for one); "
            "leave it out."
        )
    if training.get("eval_strategy", "no") != "no" and not digits and not eval_parts(config.get("data", {})):
        raise ConfigError(f"training.eval_strategy {training['eval_strategy']!r} has no effect without data.eval.")
    if training.get("eval_on_start") and not digits and not eval_parts(config.get("data", {})):
        raise ConfigError("training.eval_on_start has no effect without data.eval.")
    if preset.teacher == "separate":
        for part, section in config.get("data", {}).items():
            if named := [key for key in ("privileged_images", "privileged_text") if section.get(key) is not None]:
                warn_once(logger, f"data.{part}.{named[0]} has no effect with objective {preset.name!r}.")


def _check_needed(config: Mapping[str, Any], name: str) -> None:
    for part, section in config.get("data", {}).items():
        if section.get("path") is None:
            raise ConfigError(f"{name} needs data.{part}.path.")
    if config.get("task") is not None:
        return
    for section, key in (("student", "path"), ("data", "train")):
        if key not in config.get(section, {}):
            raise ConfigError(f"{name} needs {section}.{key} (or task: digits).")
    if config.get("teachers") == {}:
        raise ConfigError("section 'teachers' must name at least one teacher, got none.")
    if needs_teacher(config) and not teacher_sections(config):
        raise ConfigError(f"{name} needs teacher.path (or task: digits).")
    _check_teachers(config, name)


def _check_names(config: Mapping[str, Any]) -> None:
    """Names that libraries would refuse late: dtypes, and keys of generation."""
    import torch

    sections = {"student": config.get("student", {}), "teacher": config.get("teacher", {})}
    sections |= {f"teachers.{name}": section for name, section in config.get("teachers", {}).items()}
    for section, keys in sections.items():
        dtype = keys.get("dtype")
        if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ConfigError(f"{section}.dtype must be auto or one of torch, such as bfloat16, got {dtype!r}.")
    training = config.get("training", {})
    options = training.get("generation_kwargs")
    if not isinstance(options, Mapping) or training.get("use_vllm"):
        return  # vLLM has keys of its own
    from transformers import GenerationConfig

    known = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    for key in options:
        if key not in known:
            raise unknown_key(key, known, "training.generation_kwargs")
    with config_errors("training.generation_kwargs", ValueError, TypeError):
        GenerationConfig(**options)


def _with_objective(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the settings that its objective recommends, where it leaves them open."""
    training = config.get("training") or {}
    if config.get("objective") is None and training.get("preset") is None:
        return config
    preset = preset_of(config)
    settings = {} if trainer_kind(config) == "grpo" else preset.settings  # reinforcement has its own
    return {**config, "training": {**settings, **training, "preset": preset.name}}
