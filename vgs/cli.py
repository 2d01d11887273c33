"""``vgs train | eval | plan | demo``: one YAML file says what is trained on what."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DESCRIPTION = "Visual Gradient Steering: on-policy distillation of vision-language models."
NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 reads 1e-6 as text
MODEL_KEYS = ("path", "revision", "dtype", "attn_implementation", "trust_remote_code")
TEACHER_KEYS = (*MODEL_KEYS, "load_in_8bit")
# Settings of the host's that `vgs` takes from another place.
ELSEWHERE = {
    "resume_from_checkpoint": "--resume",
    "model_init_kwargs": "section student",
    "teacher_model_init_kwargs": "section teacher",
}
DIGITS_KEYS = ("cache", "teacher_seed", "student_seed", "train_size", "eval_size", "data_seed")


class ConfigError(ValueError):
    """A config that cannot be run, found before anything is loaded."""


def unknown_key(key: str, known: Iterable[str], where: str) -> ConfigError:
    """The error for a misspelt key, with the nearest valid name."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(known)}."
    if key in ELSEWHERE:
        hint = f"use {ELSEWHERE[key]}."
    return ConfigError(f"Unknown key {key!r} in {where}; {hint}")


def _schema() -> dict[str, Any]:
    """Section -> its keys; None where the section's keys belong to another library."""
    from .config import VGSConfig
    from .data import DataSource

    source = [field.name for field in dataclasses.fields(DataSource)]
    return {
        "task": None,
        "student": MODEL_KEYS,
        "teacher": TEACHER_KEYS,
        "processor": None,
        "data": {"train": source, "eval": source},
        "digits": DIGITS_KEYS,
        "training": [
            field.name for field in dataclasses.fields(VGSConfig) if field.init and field.name not in ELSEWHERE
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


def _overrides(arguments: Sequence[str], schema: Mapping[str, Any]) -> list[tuple[list[str], Any]]:
    """``--section.key value`` and ``--key=value``; a key without a section belongs to ``training``."""
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
        path = key.split(".") if "." in key or key in schema else ["training", key]
        result.append((path, yaml.safe_load(value)))
    return result


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read and check a run's YAML file.

    Args:
        path: the file; relative dataset and model paths in it start at the working directory.
        overrides: command-line arguments such as ``["--learning_rate", "1e-5", "--data.train.limit=64"]``.

    Raises:
        ValueError: an unknown key (the nearest valid one is named), or a missing section.
        FileNotFoundError: no such file.
    """
    try:
        config = yaml.safe_load(Path(path).read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    schema = _schema()
    for keys, value in _overrides(overrides, schema):
        section = config
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise ValueError(f"--{'.'.join(keys)}: {key!r} is not a section of keys.")
        section[keys[-1]] = value
    _check(config, schema, str(path))
    if config.get("task") not in (None, "digits"):
        raise ValueError(f"task must be 'digits' or left out, got {config['task']!r}.")
    if config.get("task") is None:
        for section, key in (("student", "path"), ("teacher", "path"), ("data", "train")):
            if key not in config.get(section, {}):
                raise ValueError(f"{path} needs {section}.{key} (or task: digits).")
    return _numbers(config)


@dataclasses.dataclass
class Run:
    """What a trainer is built from."""

    student: Any
    teacher: Any
    processor: Any
    train_samples: Any
    eval_samples: Any
    scorer: Any


def _digits_run(options: Mapping[str, Any], eval_split: str = "validation") -> Run:
    from .tasks.digits import build, pretrained, scorer

    cache = Path(options.get("cache", "~/.cache/vgs")).expanduser()
    teacher, processor = pretrained("teacher", cache, seed=options.get("teacher_seed", 0))
    student, _ = pretrained("student", cache, seed=options.get("student_seed", 0))
    seed = options.get("data_seed", 0)
    train, held_out = (
        build(split, options.get(key, size), seed)
        for split, key, size in (("train", "train_size", 4096), (eval_split, "eval_size", 512))
    )
    return Run(student, teacher, processor, train, held_out, scorer)


def _init_options(section: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in section.items() if key not in ("path", "load_in_8bit")}
    if section.get("load_in_8bit"):
        # As keys, for the arguments of a run are also written as JSON. Output heads are left as they are.
        options["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return options


def _check_teacher(config: Mapping[str, Any], processor: Any) -> None:
    """Stop before any weights are loaded where the teacher cannot serve."""
    from transformers.utils import is_bitsandbytes_available

    from .tokens import check_same_tokens, load_tokenizer

    training = config.get("training", {})
    if config["teacher"].get("load_in_8bit"):
        if training.get("teacher_offload"):
            raise ValueError("teacher.load_in_8bit excludes teacher_offload: 8-bit weights stay where they are.")
        if not is_bitsandbytes_available():
            raise ValueError("teacher.load_in_8bit needs bitsandbytes: pip install bitsandbytes.")
    tokenizer = load_tokenizer(config["teacher"])
    if tokenizer is not None:
        check_same_tokens(processor, tokenizer, training.get("vocab_size"))


def load_processor(config: Mapping[str, Any]) -> Any:
    """The student's processor, padding on the left; the ``processor`` section (e.g. ``max_pixels``) goes to it."""
    from transformers import AutoProcessor

    student = config["student"]
    options = {key: student[key] for key in ("revision", "trust_remote_code") if key in student}
    return AutoProcessor.from_pretrained(
        student["path"], padding_side="left", truncation_side="left", **options, **(config.get("processor") or {})
    )


def _samples(config: Mapping[str, Any], part: str, processor: Any, limit: int | None) -> Any:
    from .data import DataSource, drop_long_prompts, load_samples

    section = config["data"].get(part)
    if section is None:
        return None
    samples = load_samples(DataSource(**section))
    template = config.get("training", {}).get("chat_template_kwargs") or {}
    return samples if limit is None else drop_long_prompts(samples, processor, limit, **template)


def _run(config: Mapping[str, Any], limit: int | None) -> Run:
    if config.get("task") == "digits":
        return _digits_run(config.get("digits", {}))
    processor = load_processor(config)
    try:
        _check_teacher(config, processor)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    train, held_out = (_samples(config, part, processor, limit) for part in ("train", "eval"))
    return Run(config["student"]["path"], config["teacher"]["path"], processor, train, held_out, None)


def train(config: Mapping[str, Any], resume: str | bool | None = None) -> Any:
    """Train as a config (from ``load_config``) says, save the student to ``output_dir``; returns the trainer."""
    from .checkpoints import check_writable
    from .config import VGSConfig
    from .trainer import VGSTrainer

    options = dict(config.get("training", {}))
    options.setdefault("output_dir", "runs/vgs")
    if config.get("task") is None:
        options["model_init_kwargs"] = _init_options(config["student"])
        options["teacher_model_init_kwargs"] = _init_options(config["teacher"])
    try:
        args = VGSConfig(**options)
        check_writable(args.output_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    run = _run(config, args.max_prompt_length)
    peft_config = None
    if config.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(**config["lora"])
    trainer = VGSTrainer(
        model=run.student,
        teacher_model=run.teacher,
        args=args,
        train_dataset=run.train_samples,
        eval_dataset=run.eval_samples,
        processing_class=run.processor,
        scorer=run.scorer,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if run.eval_samples is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.accelerator.is_main_process:
            print(json.dumps({key: round(value, 4) for key, value in metrics.items() if "accuracy" in key}))
    return trainer


def evaluate(config: Mapping[str, Any], model_path: str | None, batch_size: int, out: str | None) -> dict[str, float]:
    """Greedy accuracy of the config's student, or of the model at ``model_path``, on the config's eval data.

    Raises:
        ValueError: the config has no eval data.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from .data import answers_match
    from .evaluation import evaluate_accuracy

    training = config.get("training", {})
    if config.get("task") == "digits":
        run = _digits_run(config.get("digits", {}), "test")
        model, processor, samples, scorer = run.student, run.processor, run.eval_samples, run.scorer
        if model_path is not None:
            model = AutoModelForImageTextToText.from_pretrained(model_path)
    else:
        processor = load_processor(config)
        samples = _samples(config, "eval", processor, training.get("max_prompt_length"))
        options = _init_options(config["student"])
        model = AutoModelForImageTextToText.from_pretrained(model_path or config["student"]["path"], **options)
        scorer = answers_match
    if samples is None:
        raise ValueError("The config has no data.eval to evaluate on.")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    result = evaluate_accuracy(
        model, processor, samples, scorer, batch_size, training.get("max_completion_length", 512)
    )
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return result


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
    text = "Overrides: --section.key value, e.g. --data.train.limit 64; a bare --key is one of section `training`."
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
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``vgs`` command; returns the exit status."""
    parser = build_parser()
    options, overrides = parser.parse_known_args(arguments)
    if options.command == "demo":
        if overrides:
            parser.error(f"unrecognized arguments: {' '.join(overrides)}")
        from .demo import run_demo

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
    else:
        evaluate(config, options.model, options.batch_size, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
