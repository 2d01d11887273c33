"""Every key of a config: where it stands, its type, its default and its meaning."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from ..errors import ConfigError
from ..trainers.kinds import TRAINERS

#: Keys of the host's that `vgs` takes from another place.
ELSEWHERE = {
    "resume_from_checkpoint": "--resume",
    "model_init_kwargs": "section student",
    "teacher_model_init_kwargs": "section teacher",
    "teacher_model_name_or_path": "teacher.path",
    "teacher_model_revision": "teacher.revision",
    "scorer": "the key scorer beside the sections",
}
REQUIRED = "(needed)"


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a section.

    Attributes:
        name: of the key. kind: its type, as a type hint. default: its value if left out. meaning: one sentence.
    """

    name: str
    kind: Any
    default: Any
    meaning: str

    @property
    def leaves(self) -> set[Any]:
        """The types that ``kind`` is a union of."""
        return _leaves(self.kind)

    @property
    def takes_null(self) -> bool:
        """Whether null is a value; else it is as if the key were left out."""
        return bool({Any, type(None)} & self.leaves)


def _leaves(kind: Any) -> set[Any]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return {leaf for part in typing.get_args(kind) for leaf in _leaves(part)}
    return {kind}


def _keys(*rows: tuple[str, Any, Any, str]) -> dict[str, Key]:
    return {row[0]: Key(*row) for row in rows}


TOP = _keys(
    ("objective", str, "vgs", "What is minimised: vgs, opd, gkd, ..., see docs/objectives.md."),
    ("trainer", Literal["grpo"] | None, None, "grpo: reinforcement learning with the distillation beside it."),
    ("task", Literal["digits"] | None, None, "digits: the built-in task, in place of student, teacher and data."),
    ("scorer", str | None, None, "Compares a response with the gold answer: answers_match or module:function."),
    ("teacher_column", str | None, None, "Short for training.teacher_column, of section teachers."),
    ("rewards", list[str] | str | None, None, "Short for training.rewards, of trainer: grpo."),
)
MODEL = _keys(
    ("path", str, REQUIRED, "Folder of a saved model, or its name on the Hugging Face hub."),
    ("revision", str | None, None, "Branch, tag or commit of a model on the hub."),
    ("dtype", str | None, None, "Type of the weights, e.g. bfloat16; left out: float32 for the student."),
    ("attn_implementation", str | None, None, "Attention of transformers: sdpa, eager, flash_attention_2, ..."),
    ("trust_remote_code", bool, False, "Run the Python code that lies beside the model."),
)
TEACHER = MODEL | _keys(
    ("path", str | None, None, "Folder of a saved model, or its name on the Hugging Face hub; or a url, or a cache."),
    ("load_in_8bit", bool, False, "Keep the teacher's weights in 8 bits (needs bitsandbytes)."),
    ("url", str | None, None, "Address of a teacher that `vgs serve-teacher` runs, in place of path."),
    ("token_file", str | None, None, "File with the token of that server; left out: VGS_TEACHER_TOKEN."),
    ("cache", str | None, None, "Folder of `vgs cache-teacher`, for recorded responses."),
)
DATA = _keys(
    ("path", str, REQUIRED, "File, folder or hub dataset: parquet, JSONL, JSON, CSV, TSV, arrow, save_to_disk."),
    ("subset", str | None, None, "Configuration of a hub dataset."),
    ("split", str | None, None, "Split; left out: the only one, else train."),
    ("revision", str | None, None, "Branch, tag or commit of a hub dataset."),
    ("question", str | None, None, "Column with questions or chat messages; left out: found by its name."),
    ("answer", str | None, "answer", "Column with gold answers; null: there are none."),
    ("images", str | None, "images", "Column with one picture or a list; null: only those within messages."),
    ("evidence_column", str | None, None, "Column with text that the text-only view lacks, as it lacks pictures."),
    ("privileged_images", str | None, None, "Column with pictures that only the teacher sees."),
    ("privileged_text", str | None, None, "Column with text that only the teacher sees."),
    ("responses", str | None, None, "Column with recorded responses, for training.on_policy_fraction below 1."),
    ("system_prompt", str | None, None, "Text of a system message before every question."),
    ("limit", int | None, None, "Use the first so many rows."),
    ("on_bad_row", Literal["error", "skip"], "error", "Rows that cannot be used: error, or skip and list them."),
)
DIGITS = _keys(
    ("cache", str, "~/.cache/vgs", "Folder for the trained models of the task."),
    ("teacher_seed", int, 0, "Which teacher is trained."),
    ("student_seed", int, 0, "Which student is trained."),
    ("train_size", int, 4096, "Questions to train on."),
    ("eval_size", int, 512, "Questions to evaluate on."),
    ("data_seed", int, 0, "Which questions."),
    ("context", Literal["clean", "labels"], "clean", "Privileged context of self-distillation: clean or labels."),
)
#: Sections and keys beside them, in the order in which they are shown.
SECTIONS = ("student", "teacher", "teachers", "processor", "data", "digits", "training", "lora")

#: Sections whose keys are not listed one by one.
MORE = {
    "teachers": "teachers.NAME.KEY: several teachers, each with the keys of section teacher; see teacher_column",
    "processor": "processor.KEY: settings of the student's processor and image processor, e.g. max_pixels",
}


@functools.cache
def training_keys(kind: str) -> Mapping[str, Key]:
    """Keys of section ``training``, of a kind of trainer (``vgs.trainers.kinds.TRAINERS``)."""
    settings, _ = TRAINERS[kind]()
    return _of_class(settings, ELSEWHERE)


@functools.cache
def lora_keys() -> Mapping[str, Key]:
    """Keys of section ``lora``: those of ``peft.LoraConfig``."""
    from peft import LoraConfig

    return _of_class(LoraConfig, ("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"))


def _of_class(settings: type, without: Iterable[str]) -> dict[str, Key]:
    hints = typing.get_type_hints(settings)
    keys = {}
    for field in dataclasses.fields(settings):
        if not field.init or field.name in without:
            continue
        default = field.default
        if default is dataclasses.MISSING:
            default = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        meaning = " ".join(str(field.metadata.get("help") or "").split())
        keys[field.name] = Key(field.name, hints[field.name], default, meaning)
    return keys


def all_keys(kind: str) -> dict[str, Mapping[str, Key]]:
    """Dotted section -> its keys, of a kind of trainer; ``""`` is the top of the file."""
    return {
        "": TOP,
        "student": MODEL,
        "teacher": TEACHER,
        "data.train": DATA,
        "data.eval": DATA,
        "digits": DIGITS,
        "training": training_keys(kind),
        "lora": lora_keys(),
    }


def unknown_key(key: Any, known: Iterable[str], where: str) -> ConfigError:
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


def kind_name(kind: Any) -> str:
    """A type hint in plain words, but for null: ``"a number or a text"``."""
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
    plain[Any] = "anything"
    if kind in plain:
        return plain[kind]
    origin = typing.get_origin(kind)
    if origin in (list, tuple, set) or kind in (list, tuple, set):
        return "a list"
    if origin is dict or kind is dict or not typing.get_args(kind):
        return "a section of keys" if dataclasses.is_dataclass(kind) or origin is dict or kind is dict else "a text"
    parts = [kind_name(part) for part in typing.get_args(kind) if part is not type(None)]
    return " or ".join(dict.fromkeys(parts))


def listing(pattern: str = "", kinds: Iterable[str] = tuple(TRAINERS)) -> str:
    """All keys as a table of text: name, type, default and meaning.

    Args:
        pattern: show only keys that have it in their name or meaning.
        kinds: of trainers.

    Raises:
        ConfigError: no key has the pattern.
    """
    rows: dict[str, str] = {}
    seen: dict[str, Key] = {}
    for kind in kinds:
        for section, keys in all_keys(kind).items():
            for key in keys.values():
                name = f"{section}.{key.name}" if section else key.name
                if seen.get(name) == key or pattern.lower() not in f"{name} {key.meaning}".lower():
                    continue
                default = key.default if key.default is REQUIRED else f"default {key.default!r}"
                note = "" if name not in seen else f" [{kind}]"
                seen.setdefault(name, key)
                rows[name + note] = f"{name}{note}: {kind_name(key.kind)}, {default}\n    {key.meaning}"
    for name, more in MORE.items():
        if pattern.lower() in more.lower():
            rows[name] = more
    if not rows:
        raise ConfigError(f"No key has {pattern!r} in its name or meaning; `vgs keys` lists all.")
    return "\n".join(rows.values())
