"""The teachers of a run: opened, placed, checked one by one, and which of them each row has."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from ..errors import ConfigError
from ..models.groups import PromptGroup
from ..models.vocabulary import common_rows
from ..models.wrappers import to_device, unwrap
from ..teachers.cache import StateCache
from ..teachers.cached import CachedTeacher
from ..teachers.local import KeptHead, LocalTeacher, ReloadedTeacher, facts_of
from ..teachers.protocol import Teacher, TeacherFacts
from ..teachers.served import ServedTeacher, connect
from ..teachers.sources import TeacherSource, as_sources
from .vocabulary import load_teacher, place_teacher

SHOWN = 3  # rows that an error names


@dataclass
class OpenedTeacher:
    """A teacher of a run before its first step.

    Attributes:
        source: as it was given.
        what: it, for messages.
        model: a loaded model, later as the run holds it; None where it is elsewhere, or read for each of its phases.
        load: reads the model anew; None where the model stays.
        remote: a teacher without a model here: a server.
        cache: states of recorded responses.
        facts: known from ``here`` on.
        head: of a model that is read anew, known from ``here`` on.
    """

    source: TeacherSource
    what: str
    model: nn.Module | None = None
    load: Callable[[], nn.Module] | None = None
    remote: ServedTeacher | None = None
    cache: StateCache | None = None
    facts: TeacherFacts | None = None
    head: KeptHead | None = None

    @contextmanager
    def here(self) -> Iterator[nn.Module | None]:
        """The unwrapped model, loaded inside; None for a teacher that is elsewhere."""
        if self.remote is not None or self.source.model is None:
            self.facts = (self.remote or self.cache).facts
            yield None
            return
        model = unwrap(self.model) if self.load is None else self.load()
        self.facts = facts_of(model, self.what)
        if self.load is not None and self.head is None:
            self.head = KeptHead.of(model)
        yield model

    def teacher(self, args: Any, anchor: PromptGroup | None, sharded: bool, device: torch.device) -> Teacher:
        """What a step asks, once everything has been checked."""
        live = self._live(args, anchor, sharded, device) if self.source.live else None
        return live if self.cache is None else CachedTeacher(self.cache, device, live)

    def _live(self, args: Any, anchor: PromptGroup | None, sharded: bool, device: torch.device) -> Teacher:
        if self.remote is not None:
            return self.remote
        options = local_options(args, anchor) | {"facts": self.facts, "sharded": sharded}
        if self.load is not None:
            return ReloadedTeacher(self.load, self.head, **options)
        found = LocalTeacher(self.model, **options)
        return found.offloaded(device) if args.teacher_offload else found


def local_options(args: Any, anchor: PromptGroup | None) -> dict[str, Any]:
    """What a ``LocalTeacher`` of a run is told.

    Args:
        args: the run's settings.
        anchor: see ``StepScorer``.
    """
    return {"anchor": anchor, "share_prefix": args.share_prefix, "kernel": args.packed_attention}


def open_teachers(teacher_model: Any, args: Any) -> dict[str, OpenedTeacher]:
    """The teachers that a trainer is given, loaded where they run here and stay in memory.

    Args:
        teacher_model: see ``as_sources``.
        args: the run's settings.

    Raises:
        ConfigError: several teachers without ``teacher_column`` or one with it, or what cannot be reloaded.
    """
    sources = as_sources(teacher_model)
    several = set(sources) - {""}
    if several and args.teacher_column is None:
        raise ConfigError(f"teachers {', '.join(sources)} need teacher_column, the column that names each row's.")
    if not several and args.teacher_column is not None:
        raise ConfigError(f"teacher_column={args.teacher_column!r} needs several teachers by name, got one.")
    unread = [name for name in ("teacher_offload", "teacher_reload") if getattr(args, name)]
    if unread and sources and not any(source.model is not None for source in sources.values()):
        raise ConfigError(f"{unread[0]}=True has no effect: no teacher runs here.")
    opened = {}
    for name, source in sources.items():
        what = f"teacher {name!r}" if name else "teacher_model"
        found = opened[name] = OpenedTeacher(source, what)
        if source.cache is not None:
            found.cache = source.cache if isinstance(source.cache, StateCache) else StateCache(source.cache)
        if source.url is not None:
            options = args.share_prefix, args.packed_attention
            found.remote = connect(source.url, source.token_file, args.device, *options)
        if source.model is None:
            continue
        if args.teacher_reload:
            if not isinstance(source.model, str):
                raise ConfigError(f"teacher_reload=True reads {what} from disk: give its path, not a loaded model.")
            continue
        found.model = load_teacher(source.model, args, args.world_size, source.options)
    return opened


def itself(model: nn.Module) -> dict[str, OpenedTeacher]:
    """A student that has no other teacher."""
    return {"": OpenedTeacher(TeacherSource(model), "teacher_model", model)}


def place_teachers(trainer: Any, opened: Mapping[str, OpenedTeacher]) -> None:
    """Teachers where the run keeps them; ``trainer.teacher_model`` is the one that has a model here, if it is alone.

    Args:
        trainer: its host has the student and the accelerator.
        opened: of ``open_teachers``.

    Raises:
        ConfigError: several teachers, or one that is reloaded, under DeepSpeed.
    """
    args, accelerator = trainer.args, trainer.accelerator
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
    local = [found for found in opened.values() if found.source.model is not None]
    mixed = len(opened) > 1 or any(found.cache is not None for found in local)
    if sharded and local and (args.teacher_reload or mixed):
        raise ConfigError(
            "several teachers, teacher_reload, and a cache beside a teacher need whole teachers, but DeepSpeed shards "
            "them."
        )
    for found in opened.values():
        if found.model is trainer.model:
            continue
        if found.model is not None:
            found.model = place_teacher(trainer, found.model)
        elif found.source.model is not None:
            found.load = _loader(found.source, args, accelerator.device)
    trainer.opened = dict(opened)
    trainer.teacher_model = next(iter(opened.values())).model if len(opened) == 1 else None


def _loader(source: TeacherSource, args: Any, device: torch.device) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        gc.collect()  # a model is a cycle of references, and the one before must be gone
        model = load_teacher(source.model, args, args.world_size, source.options)
        return to_device(model, device).eval()

    return load


def make_teachers(trainer: Any) -> dict[str, Teacher]:
    """What the steps of a run ask, by name.

    Args:
        trainer: after ``preparation.prepare_models``.
    """
    sharded = trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    device = trainer.accelerator.device
    return {
        name: found.teacher(trainer.args, trainer.anchor, sharded, device) for name, found in trainer.opened.items()
    }


def settle_vocabulary(args: Any, student: Any, opened: Mapping[str, OpenedTeacher]) -> None:
    """Make ``args.vocab_size`` the number of columns that the student and all teachers have.

    Args:
        args: the run's settings.
        student: its transformers config.
        opened: with their facts.

    Raises:
        ConfigError: ``vocab_size`` is above what all of them have.
    """
    given = args.vocab_size
    sizes = [common_rows(student, x.facts.head_rows, given, x.facts.what) for x in opened.values()]
    args.vocab_size = min((size for size in sizes if size is not None), default=None)


def routes_of(samples: Sequence[Mapping[str, Any]], column: str | None, names: Sequence[str]) -> list[str] | None:
    """The name of each sample's teacher; None where there is one alone.

    Args:
        samples: one per group.
        column: ``teacher_column``.
        names: of the teachers.

    Raises:
        ConfigError: a sample without a name, or with another.
    """
    if column is None:
        return None
    for sample in samples:
        if sample.get(column) not in names:
            raise ConfigError(_unrouted(column, sample.get(column), names, "a sample"))
    return [sample[column] for sample in samples]


def check_routes(data: Any, what: str, column: str | None, names: Sequence[str]) -> None:
    """Stop before training at rows that name no teacher of the run.

    Args:
        data: a dataset; of a stream the rows are looked at as they come.
        what: its name, for the message.
        column: ``teacher_column``; None: there is one teacher, and nothing to look at.
        names: of the teachers.

    Raises:
        ConfigError: such a row, or no such column.
    """
    if column is None or data is None or not hasattr(data, "__len__"):
        return
    values = column_values(data, column)
    if values is None:
        raise ConfigError(f"{what} has no column {column!r}, which teacher_column names.")
    if bad := [index for index, value in enumerate(values) if value not in names]:
        numbers = getattr(data, "indices", range(len(values)))  # of rows, of which some may have been left out
        row = f"row {numbers[bad[0]]} of {what}"
        if len(bad) > 1:
            listed = ", ".join(str(numbers[index]) for index in bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
            row += f" ({len(bad)} such rows: {listed})"
        raise ConfigError(_unrouted(column, values[bad[0]], names, row))


def _unrouted(column: str, value: Any, names: Sequence[str], row: str) -> str:
    return f"teacher_column {column!r} must be one of {', '.join(names)} in every row, got {value!r} in {row}."


def column_values(data: Any, column: str) -> list[Any] | None:
    """The values of a column, without decoding pictures where that can be helped; None where there is no such column.

    Args:
        data: a dataset of ours or of ``datasets``, or a sequence of dicts.
        column: its name.
    """
    if hasattr(data, "column"):
        return data.column(column)
    names = getattr(data, "column_names", None)
    if names is not None and getattr(data, "format", {}).get("type") != "custom":
        return list(data[column]) if column in names else None
    rows = [data[index] for index in range(len(data))]
    return [row.get(column) for row in rows] if any(column in row for row in rows) else None
