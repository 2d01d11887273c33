"""``vgs init``: a commented config for two models and a dataset, which ``check`` and ``train`` take as it is."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from ..data.checks import bad_rows
from ..data.conversations import BadRow
from ..data.formats import read_rows
from ..data.lengths import prompt_lengths
from ..data.sources import ANSWERS, IMAGES, QUESTIONS, DataSource, Samples, open_samples
from ..errors import ConfigError
from . import pair
from .budgets import context_length
from .config import check_config
from .resolved import training_arguments

logger = logging.getLogger(__name__)

# Names of columns, the likeliest first; the first few are found without being named.
QUESTION_NAMES = (*QUESTIONS, "problem", "query", "instruction", "text", "input")
IMAGE_NAMES = (*IMAGES, "img", "picture", "image_path", "file_name", "file", "path", "photo")
ANSWER_NAMES = (*ANSWERS, "answers", "label", "gold", "ground_truth", "target", "gt", "output", "response")
HELD_OUT = ("validation", "test", "val", "eval", "dev")
SIZES = {"paper-2b": (1.0e9, 3.0e9), "paper-4b": (3.0e9, 5.5e9)}  # parameters of the student
RESPONSE = 512  # tokens, where the models' contexts leave room for it
MARGIN, ROUND = 1.25, 16  # of the longest prompt, for data to come
BATCH = 8
LEAST_TO_CUT, MOST_HELD_OUT = 10, 200  # rows: fewer are not cut in two; of more, a tenth is held out, up to so many


@dataclasses.dataclass
class Data:
    """What the data hold.

    Attributes:
        section: of ``data.train``. held_out: the split to evaluate on; None: there is none.
        rows, bad: how many, of all. usable: at least so many to train on. longest: tokens of a prompt.
        sizes: (width, height) of the smallest and largest picture.
        pictures: whether all rows have some.
    """

    section: dict[str, Any]
    held_out: str | None
    rows: int
    bad: int
    usable: int
    longest: int
    sizes: tuple[tuple[int, int], tuple[int, int]] | None
    pictures: bool


def _column(names: Sequence[str], candidates: Sequence[str]) -> str | None:
    lower = {name.lower(): name for name in names}
    return next((lower[name] for name in candidates if name in lower), None)


def _held_out(path: str, samples: Samples) -> tuple[str | None, str | None]:
    """Splits to train and to evaluate on; None where there is nothing to say, or nothing to evaluate."""
    for split in HELD_OUT:
        try:
            read_rows(path, split=split)
        except ConfigError:
            continue
        return "train", split
    saved = any((Path(path) / name).exists() for name in ("state.json", "dataset_dict.json"))  # which takes no slices
    if samples.columns.answer is None or saved or len(samples) < LEAST_TO_CUT:
        return None, None
    count = max(min(len(samples) // 10, MOST_HELD_OUT), 1)
    return f"train[:-{count}]", f"train[-{count}:]"


def _open(path: str) -> tuple[dict[str, Any], Samples]:
    """The data's section, with columns that have other names than usual, and all samples."""
    rows, _ = read_rows(path)
    names = list(rows.features)
    question = _column(names, QUESTION_NAMES)
    if question is None:
        raise ConfigError(
            f"--data {path!r} has no column that looks like questions; its columns are {', '.join(names)}. Rename one "
            "to 'question'."
        )
    section: dict[str, Any] = {"path": path}
    if question not in QUESTIONS or len([name for name in QUESTIONS if name in names]) > 1:
        section["question"] = question
    chat = question in ("messages", "prompt", "conversations")
    for key, known, candidates in (("images", IMAGES, IMAGE_NAMES), ("answer", ANSWERS, ANSWER_NAMES)):
        found = _column([name for name in names if name != question], candidates)
        if found is None and not chat:
            section[key] = None
        elif found is not None and found not in known:
            section[key] = found
    return section, open_samples(DataSource(**section))


def _sizes(samples: Samples) -> tuple[list[tuple[int, int]], bool]:
    sizes, everywhere = [], True
    for index in range(len(samples)):
        try:
            images = samples.measured(index)["images"]
        except BadRow:
            continue
        sizes += [tuple(size) for size in images]
        everywhere = everywhere and bool(images)
    return sorted(sizes, key=lambda size: size[0] * size[1]), everywhere


def look_at(path: str, processor: Any) -> Data:
    """Columns, splits, rows that cannot be used, lengths and sizes of a dataset.

    Args:
        path: as of ``DataSource``.
        processor: the student's.

    Raises:
        ConfigError: data that cannot be read, or of which no row can be used.
    """
    section, samples = _open(path)
    whole = samples
    problems = {problem.row for problem in bad_rows(samples, processor)}
    total = len(samples)
    good = [place for place, number in enumerate(samples.indices) if number not in problems]
    if not good:
        raise ConfigError(f"--data {path!r} has no row that can be used; `vgs check` with a config of it says why.")
    samples = samples.select(good)
    if problems:
        section["on_bad_row"] = "skip"
    sizes, pictures = _sizes(samples)
    shown = (sizes[0], sizes[-1]) if sizes else None
    longest = max(prompt_lengths(samples, processor))
    split, held_out = _held_out(path, whole)
    if split is not None:
        section["split"] = split
    usable = len(open_samples(DataSource(**section))) - len(problems)
    return Data(section, held_out, total, len(problems), max(usable, 1), longest, shown, pictures)


def _eta(config: Any) -> str:
    from ..planning.model_size import build_on_meta

    try:
        count = sum(parameter.numel() for parameter in build_on_meta(config).parameters())
    except Exception as error:  # whatever a family's constructor does
        logger.debug("The student cannot be counted: %s", error)
        return "measure"
    return next((name for name, (least, most) in SIZES.items() if least <= count < most), "measure")


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _lines(section: dict[str, Any], indent: str) -> str:
    return "\n".join(f"{indent}{key}: {_value(value)}" for key, value in section.items())


def write(student: str, teacher: str, data: Data, configs: tuple[Any, Any], output_dir: str, cuda: bool) -> str:
    """The text of the config.

    Args:
        student, teacher: paths.
        data: of ``look_at``.
        configs: the models' transformers configs.
        output_dir: of the run.
        cuda: whether this machine has a GPU; without one the run is in float32 on the CPU.
    """
    contexts = [length for config in configs if (length := context_length(config)) is not None]
    context = min(contexts) if contexts else None
    prompt = -(-int(data.longest * MARGIN) // ROUND) * ROUND
    if context is not None and prompt > context * 3 // 4:
        prompt = data.longest
    response = RESPONSE if context is None else max(1, min(RESPONSE, context - prompt))
    batch = min(BATCH, data.usable)
    steps = max(data.usable // batch, 1)
    steered = data.pictures
    bad = f", {data.bad} of which cannot be used and are skipped" if data.bad else ""
    seen = "" if data.sizes is None else f"; pictures from {_size(data.sizes[0])} to {_size(data.sizes[1])} pixels"
    held_out = "  # eval: {path: questions to evaluate on, in the same form}\n"
    if data.held_out is not None:
        held_out = (
            f"  eval: # rows that are not trained on\n{_lines({**data.section, 'split': data.held_out}, '    ')}\n"
        )
    objective = (
        "objective: vgs # Visual Gradient Steering; opd is plain distillation, others: docs/objectives.md"
        if steered
        else "objective: opd # plain distillation: there are rows without pictures, which cannot be steered"
    )
    steering = (
        "  gamma: 2.0 # weight of the visual term\n"
        "  lam: 0.01 # weight of language preservation\n"
        f"  eta: {_eta(configs[0])} # scale of the loss: measured, or the paper's for students of 2B and 4B\n"
        if steered
        else ""
    )
    evaluation = (
        f"  eval_strategy: steps\n  eval_steps: {max(steps // 4, 1)}\n  per_device_eval_batch_size: {BATCH}\n"
        if data.held_out is not None
        else ""
    )
    return f"""# Written by `vgs init`. All keys, with their meanings: `vgs keys`. Next: `vgs check`, then `vgs train`.
{objective}
# scorer: answers_match # compares a response with the gold answer; a function of yours: module:function
student:
  path: {_value(student)} # float32 master weights
teacher:
  path: {_value(teacher)}
  dtype: {"bfloat16" if cuda else "float32"}
# processor: {{max_pixels: 1003520}} # settings of the image processor, where it has such a key
data:
  # {data.rows} rows{bad}{seen}
  train:
{_lines(data.section, "    ")}
{held_out}training:
  output_dir: {_value(output_dir)}
{steering}  # lengths, in tokens: the longest prompt has {data.longest}
  max_prompt_length: {prompt} # longer ones are dropped, and counted in the log
  max_completion_length: {response}
  # memory: `vgs plan` says what fits; lower max_tokens_per_pass or turn on teacher_offload where it does not
  gradient_checkpointing: true
  bf16: {"true" if cuda else "false # this machine has no GPU; true on one"}
{"" if cuda else "  use_cpu: true # this machine has no GPU; leave it out on one" + chr(10)}\
  # optimisation: {steps} steps of {batch} responses in an epoch
  learning_rate: 1.0e-6
  lr_scheduler_type: constant
  num_train_epochs: 1
  per_device_train_batch_size: {batch}
  gradient_accumulation_steps: 1
  # logs, checkpoints, evaluation
  logging_steps: 1
  save_steps: {max(min(steps // 4, 100), 1)}
  save_total_limit: 2
{evaluation}  seed: 0
"""


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def run(options: argparse.Namespace) -> None:
    """The command: looks at models and data, and writes the file.

    Args:
        options: ``student``, ``teacher``, ``data`` and ``out`` of the command line.

    Raises:
        ConfigError: models or data that cannot be read or do not fit each other, or a file that exists already.
    """
    if options.out.exists():
        raise ConfigError(f"--out {str(options.out)!r} exists already; name another file.")
    sections = {"student": {"path": options.student}, "teacher": {"path": options.teacher}}
    configs = tuple(pair.model_config(section, name) for name, section in sections.items())
    for name, section in sections.items():
        pair.check_weights(section, name)
    processor = pair.load_processor(sections)
    pair.check_pair(sections, processor, configs[0], sections["teacher"])
    data = look_at(options.data, processor)
    output_dir = str(Path("runs") / options.out.stem)
    text = write(options.student, options.teacher, data, configs, output_dir, torch.cuda.is_available())
    training_arguments(check_config(yaml.safe_load(text), str(options.out)))
    options.out.write_text(text)
    print(f"{options.out} is written. Next: vgs check {options.out}")
