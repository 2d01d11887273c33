"""What a config, as ``config.load_config`` returns it, trains and evaluates."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, config_errors
from ..trainers.kinds import TRAINERS, needs_teacher, trainer_kind
from .output import report

#: What libraries raise where a path, a name or a setting of the user's is wrong.
LOADING = (OSError, ValueError, TypeError, ImportError)


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
        from ..digits.pictures import scorer
        from ..digits.privileged import build, reader

        build = partial(build, context=options.get("context", "clean"))
        student, processor = reader(cache, seed=options.get("student_seed", 0))
        teacher = None
    else:
        from ..digits.task import build, pretrained, scorer

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
    """Stop before any weights are loaded where the teacher cannot serve.

    Raises:
        ConfigError: settings that exclude each other, a missing package, or other tokens than the student's.
    """
    from transformers.utils import is_bitsandbytes_available

    from ..models.tokenizers import check_same_tokens, load_tokenizer

    training = config.get("training", {})
    if config["teacher"].get("load_in_8bit"):
        if training.get("teacher_offload"):
            raise ConfigError("teacher.load_in_8bit excludes teacher_offload: 8-bit weights stay where they are.")
        if not is_bitsandbytes_available():
            raise ConfigError("teacher.load_in_8bit needs bitsandbytes: pip install bitsandbytes.")
    with config_errors(f"teacher.path {config['teacher']['path']!r}", *LOADING):
        tokenizer = load_tokenizer(config["teacher"])
        if tokenizer is not None:
            check_same_tokens(processor, tokenizer, training.get("vocab_size"))


def load_processor(config: Mapping[str, Any]) -> Any:
    """The student's processor, padding on the left; the ``processor`` section (e.g. ``max_pixels``) goes to it.

    Raises:
        ConfigError: there is none, or one without an image processor.
    """
    from transformers import AutoProcessor, ProcessorMixin

    student = config["student"]
    options = {key: student[key] for key in ("revision", "trust_remote_code") if key in student}
    options |= config.get("processor") or {}
    with config_errors(f"The processor of student.path {student['path']!r} cannot be loaded", *LOADING):
        found = AutoProcessor.from_pretrained(student["path"], padding_side="left", truncation_side="left", **options)
    if not isinstance(found, ProcessorMixin):
        raise ConfigError(
            f"student.path must be a vision-language model with a processor, got {student['path']!r} with a "
            f"{type(found).__name__}."
        )
    return found


def _samples(config: Mapping[str, Any], part: str, processor: Any, limit: int | None) -> Any:
    from ..data.lengths import drop_long_prompts
    from ..data.sources import DataSource, load_samples

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
        _check_teacher(config, processor)
    train, held_out = (_samples(config, part, processor, limit) for part in ("train", "eval"))
    return Run(config["student"]["path"], teacher, processor, train, held_out, None)


def train(config: Mapping[str, Any], resume: str | bool | None = None) -> Any:
    """Train as a config (from ``load_config``) says, save the student to ``output_dir``; returns the trainer.

    Args:
        config: of ``load_config``.
        resume: folder of a checkpoint, True for the newest complete one, None to start anew.

    Raises:
        ConfigError: settings, models or data that do not fit together, found before training starts.
    """
    from ..trainers.checkpoints import check_writable

    options = dict(config.get("training", {}))
    options.setdefault("output_dir", "runs/vgs")
    kind = trainer_kind(config)
    if config.get("task") is None:
        options["model_init_kwargs"] = _init_options(config["student"])
        if needs_teacher(config):
            options["teacher_model_init_kwargs"] = _init_options(config["teacher"])
    settings, trainer_class = TRAINERS[kind]()
    with config_errors("section training", *LOADING):
        args = settings(**options)
        check_writable(args.output_dir)
    run = _run(config, args.max_prompt_length)
    models = {"model": run.student} if kind == "self" else {"model": run.student, "teacher_model": run.teacher}
    peft_config = None
    if config.get("lora"):
        from peft import LoraConfig

        with config_errors("section lora", *LOADING):
            peft_config = LoraConfig(**config["lora"])
    with config_errors("The run cannot start", *LOADING):
        trainer = trainer_class(
            **models,
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
            report({key: round(value, 4) for key, value in metrics.items() if "accuracy" in key}, None)
    return trainer


def load_for_eval(config: Mapping[str, Any], model_path: str | None = None) -> tuple[Any, Any, Any, Any]:
    """What a config is measured on: the model (its student, or the one at ``model_path``), processor, eval samples and
    scorer.

    Args:
        config: of ``load_config``.
        model_path: a saved model or a name on the hub; None: the student.

    Raises:
        ConfigError: no eval data in the config, or a model, processor or data that cannot be loaded.
    """
    import torch

    from ..data.answers import answers_match

    if config.get("task") == "digits":
        run = _digits_run(config, "test")
        model, processor, samples, scorer = run.student, run.processor, run.eval_samples, run.scorer
        if model_path is not None:
            model = _load_model("--model", model_path, {})
    else:
        if (config.get("data") or {}).get("eval") is None:
            raise ConfigError("The config has no data.eval to evaluate on.")
        processor = load_processor(config)
        samples = _samples(config, "eval", processor, config.get("training", {}).get("max_prompt_length"))
        name = "student.path" if model_path is None else "--model"
        model = _load_model(name, model_path or config["student"]["path"], _init_options(config["student"]))
        scorer = answers_match
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor, samples, scorer


def _load_model(name: str, path: str, options: Mapping[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    with config_errors(f"{name} {path!r} cannot be loaded", *LOADING):
        return AutoModelForImageTextToText.from_pretrained(path, **options)


def evaluate(config: Mapping[str, Any], model_path: str | None, batch_size: int, out: Path | None) -> dict[str, float]:
    """Greedy accuracy of the config's student, or of the model at ``model_path``, on the config's eval data.

    Args:
        config: of ``load_config``.
        model_path: a saved model or a name on the hub; None: the student.
        batch_size: prompts per generation.
        out: a JSON file for the result, if any.

    Raises:
        ConfigError: as ``load_for_eval``, or eval data without gold answers.
    """
    from ..evaluation.accuracy import evaluate_accuracy
    from ..evaluation.sampling import Sampling

    model, processor, samples, scorer = load_for_eval(config, model_path)
    settings = {"max_completion_length": 512, **config.get("training", {})}
    sampling = Sampling.from_settings(settings, greedy=True)
    result = evaluate_accuracy(model, processor, samples, scorer, batch_size, sampling)
    report(result, out)
    return result
