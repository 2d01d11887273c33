"""``vgs cache-teacher``: the hidden states of a config's teachers on given responses, computed once and kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data.prompts import encode_groups
from ..data.recorded import end_of_turn, recorded_ids
from ..errors import ConfigError
from ..evaluation.sampling import Sampling, sample_responses
from ..models.families import placeholder_ids
from ..models.groups import PromptGroup, response_lengths, select_responses
from ..models.tokenizers import tokenizer_of
from ..teachers.cache import VIEWS, CacheWriter, Entry, Manifest
from ..teachers.fingerprints import (
    autocast_name,
    computing_versions,
    head_fingerprint,
    prompt_fingerprint,
    rendering_fingerprint,
    weights_fingerprint,
)
from ..teachers.local import LocalTeacher
from ..teachers.protocol import Teacher
from ..trainers.batching import plan_passes
from ..trainers.kinds import teacher_sections, trainer_kind
from .preflight import Preflight
from .resolved import training_arguments
from .runs import load_student
from .teacher import open_teacher

logger = logging.getLogger(__name__)

FOLDER = "runs/teacher-cache"
ROWS_PER_FILE = 32
STAGES = ("check_packages", "open_student", "check_teacher", "check_forward", "open_data", "check_data_rows")
SAMPLED = "sampled from the student {path!r}, {sampling}, seed {seed}"


class Builder:
    """Builds the caches of a config's teachers.

    Args:
        config: of ``load_config``, with models and data.

    Raises:
        ConfigError: a run that could not start either, or one without a separate teacher.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("task") is not None or trainer_kind(config) != "distillation":
            raise ConfigError("cache-teacher needs a distillation with student.path, teacher.path and data.train.path.")
        cuda = torch.cuda.is_available()
        self.device = torch.device("cuda" if cuda else "cpu")
        self.args = training_arguments(config, **({} if cuda else {"use_cpu": True}))
        self.checks = Preflight(config, self.args, not self.args.disable_tqdm, building=True)
        for stage in (*STAGES, "measure_prompts"):
            getattr(self.checks, stage)()
        self.config, self.processor = self.checks.config, self.checks.processor
        self.samples, self.options = self.checks.samples["train"], self.checks.template_options
        self.forbidden = placeholder_ids(self.checks.models["student"])
        self.end = end_of_turn(self.processor, **self.options)
        self.sampling = Sampling.from_settings(self.args, greedy=False)
        self._student: Any = None

    def teacher(self, section: Mapping[str, Any]) -> tuple[Teacher, str]:
        """A teacher, and the fingerprint of its weights."""
        found = open_teacher(section, self.args, self.device, "cache-teacher")
        return found, weights_fingerprint(found.model) if isinstance(found, LocalTeacher) else found.weights

    def rows(self, name: str) -> list[int]:
        """The places of the samples whose teacher has this name."""
        column = self.args.teacher_column
        names = [name] * len(self.samples) if column is None else self.samples.column(column)
        return [index for index, found in enumerate(names) if found == name]

    def responses(self, places: Sequence[int], number: int) -> list[list[list[int]]]:
        """Recorded responses to some samples, or sampled ones, which depend on the seed and the file alone.

        Args:
            places: of the samples.
            number: of the file that they are for.
        """
        count, tokenizer = self.args.num_generations, tokenizer_of(self.processor)
        samples = [self.samples[place] for place in places]
        if self.samples.columns.responses is not None:
            return [recorded_ids(tokenizer, sample["responses"], self.end)[:count] for sample in samples]
        if self._student is None:
            self._student = load_student(self.config, self.processor).to(self.device)
        torch.manual_seed(self.args.seed * 1_000_003 + number)
        repeated = [sample for sample in samples for _ in range(count)]
        size = self.args.per_device_train_batch_size
        found = sample_responses(
            self._student, self.processor, repeated, self.sampling, batch_size=size, progress=False
        )
        return [found[first : first + count] for first in range(0, len(found), count)]

    def entries(self, teacher: Teacher, places: Sequence[int], number: int, views: Sequence[str]) -> Iterator[Entry]:
        """What one file holds.

        Args:
            teacher: that scores.
            places: of its samples. number: of the file. views: of the states.
        """
        samples, answers = [self.samples[place] for place in places], self.responses(places, number)
        groups = encode_groups(self.processor, samples, answers, self.forbidden, self.device, **self.options)
        found = self._states(teacher, groups, "text" in views)
        for place, group in zip(places, groups, strict=True):
            key = prompt_fingerprint(group)
            for response in group.responses:
                yield Entry(place, key, response, next(found))

    def _states(self, teacher: Teacher, groups: list[PromptGroup], text: bool) -> Iterator[dict[str, torch.Tensor]]:
        lengths, found = response_lengths(groups), {}
        size = self.args.per_device_train_batch_size
        if self.args.max_tokens_per_pass is None:
            passes = [list(range(i, min(i + size, len(lengths)))) for i in range(0, len(lengths), size)]
        else:
            options = {"text": text, "share_prefix": self.args.share_prefix, "strict": False}
            passes = plan_passes(groups, self.args.max_tokens_per_pass, **options)
        dtype = autocast_name(self.args)
        precision = torch.autocast(self.device.type, getattr(torch, dtype, None), enabled=dtype != "none")
        with torch.no_grad(), teacher.ready(), precision:
            for chosen in passes:
                part = select_responses(groups, chosen)
                columns = teacher.states(part, text, lambda rows: dict(zip(VIEWS, rows, strict=False)))
                pieces = {view: x.split([lengths[index] for index in chosen]) for view, x in columns.items()}
                for position, index in enumerate(chosen):
                    found[index] = {view: pieces[view][position].cpu() for view in pieces}
        return iter([found[index] for index in range(len(lengths))])

    def build(self, name: str, section: Mapping[str, Any], folder: Path, rows_per_file: int, stored: str | None) -> str:
        """The cache of one teacher; one sentence about it.

        Args:
            name: of the teacher. section: of the config. folder: of the cache.
            rows_per_file: rows that each file holds.
            stored: type of the states in the files; None: as they are computed.
        """
        places = self.rows(name)
        if not places:
            raise ConfigError(f"no row of data.train has the teacher {name!r}.")
        teacher, weights = self.teacher(section)
        text = self.args.preset_in_force.scores_text(self.args.objective(1.0), self.args.log_terms)
        views = list(VIEWS[: 1 + text])
        writer = CacheWriter(folder, *self._manifest(teacher, weights, places, views, rows_per_file, stored))
        with writer.building() as missing:
            for number in tqdm(missing, desc="teacher", disable=self.args.disable_tqdm):
                own = [places[row] for row in writer.rows_of(number)]
                writer.write(number, list(self.entries(teacher, own, number, views)))
        size = sum(path.stat().st_size for path in folder.glob("states-*.safetensors"))
        return f"{folder}: {len(places)} rows, {writer.manifest.files} files, {size / 2**30:.3f} GiB."

    def _manifest(
        self,
        teacher: Any,
        weights: str,
        places: Sequence[int],
        views: list[str],
        rows_per_file: int,
        stored: str | None,
    ) -> tuple[Manifest, Any]:
        """What the cache is made from, and the teacher's head."""
        probe = encode_groups(
            self.processor, [self.samples[places[0]]], [[[self.end]]], self.forbidden, self.device, **self.options
        )
        (first,) = self._states(teacher, probe, False)
        computed = str(first["image"].dtype).removeprefix("torch.")
        recorded = self.samples.columns.responses
        with teacher.ready(), teacher.head(first["image"].dtype) as head:
            manifest = Manifest(
                weights=weights,
                head=head_fingerprint(head),
                rendering=rendering_fingerprint(self.processor, self.forbidden, **self.options),
                data=self.checks.cached_data,
                responses=f"column {recorded!r}"
                if recorded is not None
                else SAMPLED.format(path=self.config["student"]["path"], sampling=self.sampling, seed=self.args.seed),
                per_prompt=self.args.num_generations,
                autocast=autocast_name(self.args),
                computed=computed,
                stored=stored or computed,
                views=views,
                versions=computing_versions(),
                rows=len(places),
                rows_per_file=rows_per_file,
                head_rows=teacher.facts.head_rows,
                placeholder_ids=teacher.facts.placeholder_ids,
            )
            return manifest, head


def run(
    config: Mapping[str, Any], out: Path | None, rows_per_file: int = ROWS_PER_FILE, stored: str | None = None
) -> int:
    """The command: builds what is missing of the caches, prints a line about each; returns the exit status.

    Args:
        config: of ``load_config``.
        out: the folder, of several teachers one with a folder for each; None: ``cache`` of the teacher's section, else
            ``runs/teacher-cache``.
        rows_per_file: rows that each file holds, and that a kill can cost.
        stored: type of the states in the files; None: as they are computed.

    Raises:
        ConfigError: as ``Builder``, or a folder that holds another cache.
    """
    builder = Builder(config)
    for name, section in teacher_sections(builder.config).items():
        given = section.get("cache") if out is None else out / name
        folder = Path(FOLDER) / name if given is None else Path(given)
        print(builder.build(name, section, folder, rows_per_file, stored))
    return 0
