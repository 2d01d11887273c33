"""A config with everything that a run takes by itself: the settings class, built, and its values written out."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Mapping
from typing import Any

import yaml
from safetensors import SafetensorError

from ..errors import ConfigError, config_errors
from ..trainers.kinds import TRAINERS, needs_teacher, preset_of, teacher_sections, trainer_kind
from .keys import DATA, DIGITS, REQUIRED

#: What libraries raise where a path, a name or a setting of the user's is wrong.
LOADING = (OSError, ValueError, TypeError, ImportError, KeyError, AttributeError, RuntimeError, SafetensorError)
OUTPUT_DIR = "runs/vgs"
#: Keys of a section for a model that are no arguments of ``from_pretrained``.
NO_OPTIONS = ("path", "load_in_8bit", "url", "token_file", "cache")


def model_options(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a config's ``student`` or ``teacher`` section."""
    options = {key: value for key, value in section.items() if key not in NO_OPTIONS}
    if section.get("load_in_8bit"):
        # As keys, for the arguments of a run are also written as JSON. Output heads are left as they are.
        options["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return options


def teacher_sources(config: Mapping[str, Any], caches: Mapping[str, Any] | None = None) -> Any:
    """The ``teacher_model`` of a config's trainer: where one teacher is from, or several by name; None for none.

    Args:
        config: of ``load_config``.
        caches: those that are open already, by the teacher's name.
    """
    from ..teachers.sources import TeacherSource

    opened = caches or {}

    def source(name: str, section: Mapping[str, Any], options: Mapping[str, Any]) -> TeacherSource:
        cache = opened.get(name, section.get("cache"))
        return TeacherSource(section.get("path"), options, section.get("url"), section.get("token_file"), cache)

    sections = teacher_sections(config)
    if "" in sections:  # its options are among the trainer's settings
        return source("", sections[""], {})
    return {name: source(name, x, model_options(x) if "path" in x else {}) for name, x in sections.items()} or None


def training_arguments(config: Mapping[str, Any], **overrides: Any) -> Any:
    """The settings of a config's trainer, which checks them.

    Args:
        config: of ``load_config``.
        **overrides: of its ``training`` section.

    Raises:
        ConfigError: settings that are out of range, or exclude each other.
    """
    options = {"output_dir": OUTPUT_DIR, **config.get("training", {}), **overrides}
    if config.get("task") is None:
        options["model_init_kwargs"] = model_options(config["student"])
        if "path" in config.get("teacher", {}) and needs_teacher(config):
            options["teacher_model_init_kwargs"] = model_options(config["teacher"])
    settings, _ = TRAINERS[trainer_kind(config)]()
    with config_errors("section training", *LOADING):
        args = settings(**options)
    _check_teacher_settings(config)
    return args


def _check_teacher_settings(config: Mapping[str, Any]) -> None:
    from transformers.utils import is_bitsandbytes_available

    if any(section.get("load_in_8bit") for section in teacher_sections(config).values()):
        if config.get("training", {}).get("teacher_offload"):
            raise ConfigError("teacher.load_in_8bit excludes teacher_offload: 8-bit weights stay where they are.")
        if not is_bitsandbytes_available():
            raise ConfigError("teacher.load_in_8bit needs bitsandbytes: pip install bitsandbytes.")


def _own_fields(settings: type) -> list[str]:
    """Settings that this project adds to its host's."""
    classes = [cls for cls in settings.__mro__ if cls.__module__.startswith("vgs.")]
    return list(dict.fromkeys(name for cls in reversed(classes) for name in inspect.get_annotations(cls)))


def resolved(config: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """The config with the defaults of this project that were in force; ``load_config`` takes it for the same run.

    Args:
        config: of ``load_config``.
        args: of ``training_arguments``.
    """
    from ..objectives.definitions import SETTINGS

    preset, kind = preset_of(config), trainer_kind(config)
    unread = {name for name in SETTINGS if not preset.reads(name)} | {"teacher_model_init_kwargs", "_VALID_DICT_FIELDS"}
    if preset.name != "gkd" or kind == "grpo":
        unread.add("beta")
    own = {name: _plain(getattr(args, name)) for name in _own_fields(type(args)) if name not in unread}
    training = {"output_dir": args.output_dir, **{name: value for name, value in own.items() if value is not None}}
    result = {"objective": preset.name, **config, "training": {**config.get("training", {}), **training}}
    if "data" in config:
        result["data"] = {part: {**_defaults(DATA), **section} for part, section in config["data"].items()}
    if config.get("task") == "digits":
        result["digits"] = {**_defaults(DIGITS), **config.get("digits", {})}
    return result


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def _defaults(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {name: key.default for name, key in keys.items() if key.default not in (None, REQUIRED)}


def as_yaml(config: Mapping[str, Any]) -> str:
    """A resolved config as the text of a YAML file."""
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
