"""``vgs train | eval | plan | kl-gap | demo | study``: one YAML file says what is trained on what."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..digits import studies
from ..errors import ConfigError
from ..trainers.kinds import TRAINERS, needs_teacher, preset_of, trainer_kind
from . import kl_gap_command
from .runs import evaluate, train

DESCRIPTION = "Visual Gradient Steering: on-policy distillation of vision-language models."
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
    """The error for a misspelt key, with the nearest valid name."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
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
        raise ValueError(f"{where} must be a section of keys, got {config!r}.")
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
            raise ValueError(f"Expected --key value, got {option!r}.")
        key, separator, value = option[2:].partition("=")
        if not separator:
            if not pending:
                raise ValueError(f"--{key} needs a value.")
            value = pending.pop(0)
        path = key.split(".") if "." in key or key in SECTIONS else ["training", key]
        result.append((path, yaml.safe_load(value) if value else ""))
    return result


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and check a run's YAML file.

    Args:
        path: the file; relative dataset and model paths in it start at the working directory.
        overrides: command-line arguments such as ``["--learning_rate", "1e-5", "--data.train.limit=64"]``.

    Raises:
        ValueError: an unknown key or objective (the nearest valid one is named), or a missing section.
        FileNotFoundError: no such file.
    """
    try:
        config = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    for keys, value in _overrides(overrides):
        section = config
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ValueError(f"--{'.'.join(keys)}: {key!r} is not a section of keys.")
        section[keys[-1]] = value
    _check(config, _schema(config), str(path))
    if config.get("task") not in (None, "digits"):
        raise ValueError(f"task must be 'digits' or left out, got {config['task']!r}.")
    if config.get("task") is None:
        needed = [("student", "path"), ("teacher", "path"), ("data", "train")]
        if not needs_teacher(config):
            needed.remove(("teacher", "path"))
        for section, key in needed:
            if key not in config.get(section, {}):
                raise ValueError(f"{path} needs {section}.{key} (or task: digits).")
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


def _add_plan(commands: Any, overrides: str) -> None:
    about = "predicted memory of a training run, by part"
    command = commands.add_parser("plan", help=about, description=f"{about}. {overrides}", allow_abbrev=False)
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument("--gpu-memory", type=float, metavar="GiB", help="memory of one GPU (this machine's, if any)")
    command.add_argument("--gpus", type=int, default=1)
    command.add_argument("--sharding", choices=("ddp", "fsdp2"), default="ddp", help="how the student is spread (ddp)")
    command.add_argument("--response-tokens", type=int, help="longest response (max_completion_length)")
    command.add_argument("--prompt-tokens", type=int, default=200, help="text tokens of a prompt")
    command.add_argument("--image-tokens", type=int, default=1000, help="image tokens of a prompt")
    command.add_argument("--json", action="store_true", help="for machines: bytes")


def build_parser() -> argparse.ArgumentParser:
    """The command line; options that it does not know are overrides of the config."""
    parser = argparse.ArgumentParser(prog="vgs", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    text = (
        "Overrides: --section.key value, e.g. --data.train.limit 64; --objective, --task and --trainer; any other bare "
        "--key is one of section `training`."
    )
    for name, about in (("train", "distil a student"), ("eval", "greedy accuracy of a model")):
        command = commands.add_parser(name, help=about, description=f"{about}. {text}", allow_abbrev=False)
        command.add_argument("config", metavar="CONFIG.yaml")
        if name == "train":
            command.add_argument("--resume", nargs="?", const=True, help="a checkpoint; alone: the newest complete")
        else:
            command.add_argument("--model", help="evaluate this model instead of the config's student")
            command.add_argument("--batch-size", type=int, default=8)
            command.add_argument("--out", help="write the result to this JSON file")
    _add_plan(commands, text)
    demo = commands.add_parser("demo", help="plain distillation against VGS on handwritten digits", allow_abbrev=False)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for results.json and pictures")
    demo.add_argument("--cache", type=Path, help="folder for the trained teacher and student (~/.cache/vgs)")
    demo.add_argument("--quick", action="store_true", help="seconds, to see that everything runs")
    kl_gap_command.add_parser(commands, text)
    studies.add_parser(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``vgs`` command; returns the exit status."""
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.command in ("demo", "study"):
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        if options.command == "study":
            studies.run(options)
        else:
            from ..digits.demo import run_demo

            run_demo(options.out, options.cache, options.quick)
        return 0
    try:
        config = load_config(options.config, overrides)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if options.command == "train":
        try:
            train(config, options.resume)
        except ConfigError as error:
            parser.error(str(error))
    elif options.command == "plan":
        from .plan_report import show

        try:
            show(config, options)
        except ValueError as error:
            parser.error(str(error))
    elif options.command == "kl-gap":
        try:
            kl_gap_command.run(options, config)
        except ConfigError as error:
            parser.error(str(error))
    else:
        evaluate(config, options.model, options.batch_size, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
