"""What a config, as ``config.load_config`` returns it, trains and evaluates."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, config_errors
from ..trainers.kinds import TRAINERS, trainer_kind
from .config import eval_parts
from .output import report
from .resolved import LOADING, model_options, resolved, teacher_sources, training_arguments

logger = logging.getLogger(__name__)


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

        teacher = digits_teacher(config)
        student, processor = pretrained("student", cache, seed=options.get("student_seed", 0))
    seed = options.get("data_seed", 0)
    train, held_out = (
        build(split, options.get(key, size), seed)
        for split, key, size in (("train", "train_size", 4096), (eval_split, "eval_size", 512))
    )
    return Run(student, teacher, processor, train, held_out, scorer)


def digits_teacher(config: Mapping[str, Any]) -> Any:
    """The built-in task's teacher, as a config has it."""
    from ..digits.task import pretrained

    options = config.get("digits", {})
    cache = Path(options.get("cache", "~/.cache/vgs")).expanduser()
    teacher, _ = pretrained("teacher", cache, seed=options.get("teacher_seed", 0))
    return teacher


def _on_main(args: Any, function: Callable[[], None]) -> None:
    """Call a function on the main process; an error of the user's is raised on all, so that none waits for others."""
    from accelerate.utils import broadcast_object_list

    args.device  # noqa: B018  (the processes find each other)
    problem: list[str | None] = [None]
    if args.process_index == 0:
        try:
            function()
        except ConfigError as error:
            problem[0] = str(error)
    if args.world_size > 1:
        broadcast_object_list(problem)
    if problem[0] is not None:
        raise ConfigError(problem[0])


def _stop_callback(args: Any, kind: str) -> Any:
    """Saves a checkpoint at a signal, where a run can be resumed exactly: in GRPO after the last step on a batch."""
    from ..trainers.interrupt import StopOnSignal

    if kind != "grpo":
        return StopOnSignal()
    cycle = args.steps_per_generation * args.num_iterations
    return StopOnSignal(max(cycle // args.gradient_accumulation_steps, 1))


def train(
    config: Mapping[str, Any],
    resume: str | bool | None = None,
    *,
    overwrite: bool = False,
    allow_changes: bool = False,
) -> Any:
    """Train as a config (from ``load_config``) says, save the student to ``output_dir``; returns the trainer.

    Its attribute ``stopped`` is the ``StopOnSignal`` of the run: where it has received a signal, the last checkpoint
    holds the run, and no model is saved beside it.

    Args:
        config: of ``load_config``.
        resume: folder of a checkpoint, True for the newest complete one, None to start anew.
        overwrite: delete the checkpoints and the model that an earlier run left in ``output_dir``.
        allow_changes: resume although settings or data differ from those that the run began with.

    Raises:
        ConfigError: settings, models or data that do not fit together, a used ``output_dir``, or a run that would be
            resumed as another, all found before a model is loaded.
    """
    from ..trainers.checkpoints import check_writable
    from ..trainers.run_folder import RunFolder
    from .preflight import STAGES, Preflight

    if isinstance(resume, str) and not Path(resume).is_dir():
        raise ConfigError(f"--resume must be the folder of a checkpoint, got {resume!r}.")
    args = training_arguments(config)
    folder = RunFolder(args.output_dir)
    _on_main(args, lambda: folder.check_unused(bool(resume) or overwrite))
    check_writable(args.output_dir)
    checks = Preflight(config, args, progress=not args.disable_tqdm)
    stages = list(STAGES.values())
    opening = stages.index("open_data") + 1
    for stage in stages[:opening]:
        getattr(checks, stage)()
    with ExitStack() as stack:
        claim = folder.claim(
            resolved(checks.config, args),
            checks.fingerprints(),
            resume=bool(resume),
            overwrite=overwrite,
            allow_changes=allow_changes,
        )
        _on_main(args, lambda: stack.enter_context(claim))
        with args.main_process_first(local=True, desc="checking the data"):  # the others read what it has found
            for stage in stages[opening:]:
                getattr(checks, stage)()
        return _train(checks, args, resume)


def _train(checks: Any, args: Any, resume: str | bool | None) -> Any:
    config, kind = checks.config, trainer_kind(checks.config)
    if checks.digits:
        run = _digits_run(config)
    else:
        teacher = teacher_sources(config, checks.caches)  # each is read once
        samples = checks.samples
        held_out = eval_parts(samples)
        held_out = held_out.get("", held_out) or None  # one set, several by name, or none
        run = Run(config["student"]["path"], teacher, checks.processor, samples["train"], held_out, None)
    models = {"model": run.student} if kind == "self" else {"model": run.student, "teacher_model": run.teacher}
    peft_config = None
    if config.get("lora"):
        from peft import LoraConfig

        peft_config = LoraConfig(**config["lora"])
    from ..trainers.model_card import untouched

    _, trainer_class = TRAINERS[kind]()
    with config_errors("The run cannot start", *LOADING):
        trainer = trainer_class(
            **models,
            args=args,
            train_dataset=run.train_samples,
            eval_dataset=run.eval_samples,
            processing_class=run.processor,
            scorer=checks.scorer or run.scorer,
            peft_config=peft_config,
        )
    trainer.stopped = _stop_callback(args, kind)
    trainer.add_callback(trainer.stopped)
    trainer.train(resume_from_checkpoint=resume)
    if trainer.stopped.received is not None:
        return trainer
    with untouched(trainer):
        trainer.save_model()
    if run.eval_samples is not None:
        metrics = trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        if trainer.accelerator.is_main_process:
            report({key: round(value, 4) for key, value in metrics.items() if "accuracy" in key}, None)
    trainer.save_state()
    trainer.create_model_card()
    return trainer


@dataclasses.dataclass
class Measured:
    """What a config is measured on: the model on its device, how it is asked, and what it is asked.

    Attributes:
        sets: name -> samples; a single set has the name "".
        args: the trainer's settings, of which template, generation and lengths are the run's.
    """

    model: Any
    processor: Any
    sets: dict[str, Any]
    scorer: Any
    args: Any

    @property
    def template_options(self) -> dict[str, Any]:
        """What goes to ``apply_chat_template``."""
        return dict(self.args.chat_template_kwargs or {})

    def as_trained(self) -> Any:
        """The model computes inside as it does in training: with bf16 on a GPU, from weights of the run's type."""
        import torch

        device = self.model.device.type
        return torch.autocast(device, torch.bfloat16, enabled=bool(self.args.bf16) and device == "cuda")


def load_for_eval(config: Mapping[str, Any], model_path: str | None = None) -> Measured:
    """What a config is measured on: the model (its student, or the one at ``model_path``) and all of its eval samples.

    Args:
        config: of ``load_config``.
        model_path: a saved model or a name on the hub; None: the student.

    Raises:
        ConfigError: no eval data in the config, or a model, processor or data that cannot be loaded.
    """
    import torch

    from ..data.answers import answers_match
    from ..evaluation.rewards import find_scorer
    from ..models.pictures import reads_pictures
    from .pair import load_processor, model_config

    cuda = torch.cuda.is_available()
    args = training_arguments(config, **({} if cuda else {"use_cpu": True}))
    scorer = None if config.get("scorer") is None else find_scorer(config["scorer"])
    if config.get("task") == "digits":
        run = _digits_run(config, "test")
        model, processor, sets = run.student, run.processor, {"": run.eval_samples}
        scorer = scorer or run.scorer
        if model_path is not None:
            model = _load_model("--model", model_path, {})
    else:
        if not eval_parts(config.get("data") or {}):
            raise ConfigError("The config has no data.eval to evaluate on.")
        text_only = not reads_pictures(model_config(config["student"], "student", needs_pictures=False))
        processor = load_processor(config, text_only)
        sets = eval_samples(config, processor, not args.disable_tqdm)
        name = "student.path" if model_path is None else "--model"
        options = model_options(config["student"])
        model = _load_model(name, model_path or config["student"]["path"], options, text_only)
        scorer = scorer or answers_match
    return Measured(model.to("cuda" if cuda else "cpu"), processor, sets, scorer, args)


def eval_samples(config: Mapping[str, Any], processor: Any, progress: bool) -> dict[str, Any]:
    """The config's eval samples by name: all, but for rows that cannot be used where it says ``on_bad_row: skip``.

    Raises:
        ConfigError: data that cannot be read.
    """
    from ..data.checks import good_rows
    from ..data.sources import DataSource, open_samples

    return {
        name: good_rows(open_samples(DataSource(**section)), processor, progress)
        for name, section in eval_parts(config["data"]).items()
    }


def load_student(config: Mapping[str, Any], processor: Any) -> Any:
    """The student of a config as evaluation loads it.

    Args:
        config: of ``load_config``. processor: the student's.

    Raises:
        ConfigError: it cannot be loaded.
    """
    section, text_only = config["student"], not hasattr(processor, "tokenizer")
    return _load_model("student.path", section["path"], model_options(section), text_only)


def _load_model(name: str, path: str, options: Mapping[str, Any], text_only: bool = False) -> Any:
    from .pair import auto_class

    # Of the run's type and not the checkpoint's, or a model before and after training would compute differently.
    options = {"dtype": "float32", **options}
    with config_errors(f"{name} {path!r} cannot be loaded", *LOADING):
        return auto_class(text_only).from_pretrained(path, **options)


def evaluate(config: Mapping[str, Any], model_path: str | None, batch_size: int, out: Path | None) -> dict[str, Any]:
    """Greedy accuracy of the config's student, or of the model at ``model_path``, on the config's eval data.

    Args:
        config: of ``load_config``.
        model_path: a saved model or a name on the hub; None: the student.
        batch_size: prompts per generation.
        out: a JSON file for the result, if any.

    Returns:
        As ``vgs.evaluation.accuracy.evaluate_accuracy``; of several sets one such result for each name.

    Raises:
        ConfigError: as ``load_for_eval``, or eval data without gold answers.
    """
    from ..evaluation.accuracy import evaluate_accuracy
    from ..evaluation.sampling import Sampling

    found = load_for_eval(config, model_path)
    sampling = Sampling.from_settings(found.args, greedy=True)
    with found.as_trained():
        results: dict[str, Any] = {
            name: evaluate_accuracy(found.model, found.processor, samples, found.scorer, batch_size, sampling)
            for name, samples in found.sets.items()
        }
    result = results.get("", results)
    report(result, out)
    return result
