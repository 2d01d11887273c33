"""What a config, as ``vgs.cli.load_config`` returns it, trains and evaluates."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .presets import Preset


class ConfigError(ValueError):
    """A config that cannot be run, found before anything is loaded."""


def _distillation() -> tuple[type, type]:
    from .config import VGSConfig
    from .trainer import VGSTrainer

    return VGSConfig, VGSTrainer


def _self_distillation() -> tuple[type, type]:
    from .opsd import SelfDistillationConfig, SelfDistillationTrainer

    return SelfDistillationConfig, SelfDistillationTrainer


def _reinforcement() -> tuple[type, type]:
    from .grpo import VGSGRPOConfig, VGSGRPOTrainer

    return VGSGRPOConfig, VGSGRPOTrainer


#: Kind of a run -> its classes of settings and trainer.
TRAINERS = {"distillation": _distillation, "self": _self_distillation, "grpo": _reinforcement}


def preset_of(config: Mapping[str, Any]) -> Preset:
    """What a config minimises: its ``objective``, else ``training.preset``, else ``"vgs"``.

    Raises:
        ValueError: an unknown name, or two that differ.
    """
    from .presets import find_preset

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
        ValueError: another ``trainer``, or as ``preset_of``.
    """
    trainer, preset = config.get("trainer"), preset_of(config)
    if trainer not in (None, "grpo"):
        raise ConfigError(f"trainer must be 'grpo' or left out, got {trainer!r}.")
    if trainer is not None:
        return trainer
    return "distillation" if preset.teacher == "separate" else "self"


def needs_teacher(config: Mapping[str, Any]) -> bool:
    """Whether a run has another model to learn from; not where it is its own teacher, and not in GRPO alone."""
    kind = trainer_kind(config)
    return kind != "self" and not (kind == "grpo" and (config.get("training") or {}).get("alpha") == 0)


@dataclasses.dataclass
class Run:
    """What a trainer is built from."""

    student: Any
    teacher: Any
    processor: Any
    train_samples: Any
    eval_samples: Any
    scorer: Any


def _digits_run(config: Mapping[str, Any], eval_split: str = "validation") -> Run:
    options = config.get("digits", {})
    cache = Path(options.get("cache", "~/.cache/vgs")).expanduser()
    if trainer_kind(config) == "self":
        from .tasks.digits_data import scorer
        from .tasks.digits_privileged import build, reader

        build = partial(build, context=options.get("context", "clean"))
        student, processor = reader(cache, seed=options.get("student_seed", 0))
        teacher = None
    else:
        from .tasks.digits import build, pretrained, scorer

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
        return _digits_run(config)
    processor = load_processor(config)
    teacher = config["teacher"]["path"] if needs_teacher(config) else None
    if teacher is not None:
        try:
            _check_teacher(config, processor)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    train, held_out = (_samples(config, part, processor, limit) for part in ("train", "eval"))
    return Run(config["student"]["path"], teacher, processor, train, held_out, None)


def train(config: Mapping[str, Any], resume: str | bool | None = None) -> Any:
    """Train as a config (from ``load_config``) says, save the student to ``output_dir``; returns the trainer."""
    from .checkpoints import check_writable
    from .presets import PresetError

    options = dict(config.get("training", {}))
    options.setdefault("output_dir", "runs/vgs")
    kind = trainer_kind(config)
    if config.get("task") is None:
        options["model_init_kwargs"] = _init_options(config["student"])
        if needs_teacher(config):
            options["teacher_model_init_kwargs"] = _init_options(config["teacher"])
    settings, trainer_class = TRAINERS[kind]()
    try:
        args = settings(**options)
        check_writable(args.output_dir)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    run = _run(config, args.max_prompt_length)
    models = {"model": run.student} if kind == "self" else {"model": run.student, "teacher_model": run.teacher}
    peft_config = None
    if config.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(**config["lora"])
    try:
        trainer = trainer_class(
            **models,
            args=args,
            train_dataset=run.train_samples,
            eval_dataset=run.eval_samples,
            processing_class=run.processor,
            scorer=run.scorer,
            peft_config=peft_config,
        )
    except PresetError as error:
        raise ConfigError(str(error)) from error
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if run.eval_samples is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.accelerator.is_main_process:
            print(json.dumps({key: round(value, 4) for key, value in metrics.items() if "accuracy" in key}))
    return trainer


def load_for_eval(config: Mapping[str, Any], model_path: str | None = None) -> tuple[Any, Any, Any, Any]:
    """What a config is measured on: the model (its student, or the one at ``model_path``), processor, eval samples and
    scorer.

    Raises:
        ConfigError: the config has no eval data.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from .data import answers_match

    if config.get("task") == "digits":
        run = _digits_run(config, "test")
        model, processor, samples, scorer = run.student, run.processor, run.eval_samples, run.scorer
        if model_path is not None:
            model = AutoModelForImageTextToText.from_pretrained(model_path)
    else:
        processor = load_processor(config)
        samples = _samples(config, "eval", processor, config.get("training", {}).get("max_prompt_length"))
        if samples is None:
            raise ConfigError("The config has no data.eval to evaluate on.")
        options = _init_options(config["student"])
        model = AutoModelForImageTextToText.from_pretrained(model_path or config["student"]["path"], **options)
        scorer = answers_match
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, samples, scorer


def evaluate(config: Mapping[str, Any], model_path: str | None, batch_size: int, out: str | None) -> dict[str, float]:
    """Greedy accuracy of the config's student, or of the model at ``model_path``, on the config's eval data.

    Raises:
        ConfigError: the config has no eval data.
    """
    from .evaluation import evaluate_accuracy

    model, processor, samples, scorer = load_for_eval(config, model_path)
    longest = config.get("training", {}).get("max_completion_length", 512)
    result = evaluate_accuracy(model, processor, samples, scorer, batch_size, longest)
    if out is not None:
        Path(out).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return result
