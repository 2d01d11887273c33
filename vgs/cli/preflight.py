"""What is looked at before any model is loaded: by ``vgs check`` in a report, by ``vgs train`` at its start.

One method a stage, in the order of ``STAGES``; each keeps what the next ones need. A stage stops at what makes a run
impossible (``ConfigError``) and logs a warning for what only looks wrong.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..data.check_prompts import check_prompts
from ..data.checks import data_fingerprint, good_rows
from ..data.lengths import keep_short_prompts, prompt_lengths
from ..data.privileged import check_columns
from ..data.prompts import check_text_view
from ..data.sources import DataSource, Samples, listed, open_samples
from ..errors import ConfigError, config_errors
from ..evaluation.rewards import check_rewards, find_scorer
from ..models.families import placeholder_ids
from ..models.pictures import reads_pictures
from ..models.routers import check_routers
from ..models.self_check import way_of
from ..models.vocabulary import common_rows, head_rows
from ..teachers.cache import StateCache
from ..teachers.served import TeacherClient, check_served
from ..teachers.server import read_token
from ..teachers.sources import as_sources
from ..trainers.checks import check_columns_for, check_teacher_kind, marks_evidence
from ..trainers.kinds import needs_teacher, teacher_sections, trainer_kind
from ..trainers.off_policy import check_caches, check_recorded
from ..trainers.routes import check_routes
from . import budgets, pair
from .keys import DIGITS
from .resolved import LOADING, teacher_sources
from .steps import Steps, plan_steps, processes, say_steps

logger = logging.getLogger(__name__)

#: Name of a stage -> the method.
STAGES = {
    "packages": "check_packages",
    "scorer and rewards": "find_scoring",
    "student": "open_student",
    "teacher": "check_teacher",
    "forward": "check_forward",
    "data": "open_data",
    "rows": "check_data_rows",
    "prompts": "measure_prompts",
    "steps": "count_steps",
    "lengths": "check_budgets",
    "disk": "check_room",
}


@dataclasses.dataclass
class Preflight:
    """A run before its models.

    Attributes:
        config: of ``load_config``; a vocabulary that both models have is filled in.
        args: the trainer's settings.
        progress: show bars.
        processor: the student's. models: ``"student"`` and ``"teacher"`` (or ``"teachers.NAME"``), their transformers
            configs.
        samples: of ``"train"`` and ``"eval"``, where the config has them.
        building: caches of the teachers are to be made, and not to be read.
        caches: states of recorded responses, by the teacher's name; of one alone "".
        cached_data: what a cache's manifest says of the data: a hash of the training rows, and which are too long.
        longest: tokens of the longest prompt. steps: of the run. scorer: None for the task's own.
    """

    config: Mapping[str, Any]
    args: Any
    progress: bool = True
    processor: Any = None
    models: dict[str, Any] = dataclasses.field(default_factory=dict)
    samples: dict[str, Samples] = dataclasses.field(default_factory=dict)
    longest: int | None = None
    steps: Steps | None = None
    scorer: Any = None
    building: bool = False
    caches: dict[str, StateCache] = dataclasses.field(default_factory=dict)
    cached_data: str = ""

    @property
    def digits(self) -> bool:
        """Whether the run is the built-in task, which brings models and data."""
        return self.config.get("task") == "digits"

    @property
    def template_options(self) -> dict[str, Any]:
        """What goes to ``apply_chat_template``, wherever a model of this run is asked."""
        return dict(self.args.chat_template_kwargs or {})

    def run_all(self) -> None:
        """All stages.

        Raises:
            ConfigError: the run cannot work.
        """
        for method in STAGES.values():
            getattr(self, method)()

    # ---- stages

    def check_packages(self) -> None:
        """Packages that the settings ask for."""
        budgets.check_versions(self.args)

    def find_scoring(self) -> None:
        """The comparison of answers, the rewards, and the adapter's settings."""
        if self.config.get("scorer") is not None:
            self.scorer = find_scorer(self.config["scorer"])
        if rewards := getattr(self.args, "rewards", None):
            check_rewards(rewards)
        if self.config.get("lora"):
            from peft import LoraConfig

            with config_errors("section lora", *LOADING):
                LoraConfig(**self.config["lora"])

    def open_student(self) -> None:
        """The student's config and processor."""
        if self.digits:
            return
        preset = self.args.preset_in_force
        compares = needs_teacher(self.config) and preset.needs_text(self.args.objective(1.0))
        needed = trainer_kind(self.config) == "self" or "control" in preset.views
        # Of a text-only model that compares two views, the data must have marked evidence: see ``check_data_rows``.
        needed = needed or (compares and "train" not in self.config.get("data", {}))
        student = pair.model_config(self.config["student"], "student", needed)
        pair.check_weights(self.config["student"], "student")
        self.processor = pair.load_processor(self.config, text_only=not reads_pictures(student))
        self.models["student"] = student

    def check_teacher(self) -> None:
        """Whether the teacher can read the student's prompts and pictures, and has its tokens."""
        if self.digits or not needs_teacher(self.config) or self.processor is None:
            return
        if not self.building:
            fraction = getattr(self.args, "on_policy_fraction", 1)
            check_caches(as_sources(teacher_sources(self.config)), fraction)
        sizes = [self._check_teacher(name, section) for name, section in teacher_sections(self.config).items()]
        size = min((size for size in sizes if size is not None), default=None)
        if size is not None:
            self.config = {**self.config, "training": {**self.config.get("training", {}), "vocab_size": size}}
        self.args.vocab_size = size

    def _check_teacher(self, name: str, section: Mapping[str, Any]) -> int | None:
        """One of the teachers; vocabulary columns that it has in common with the student, None for all."""
        student, where = self.models["student"], f"teachers.{name}" if name else "teacher"
        if "cache" in section and not self.building:
            self.caches[name] = StateCache(section["cache"])
        vocab_size = self.config.get("training", {}).get("vocab_size")
        if "url" in section:
            client = TeacherClient(section["url"], read_token(section.get("token_file")), attempts=1)
            return check_served(client, client.fingerprint(), self.processor, student, vocab_size)
        if "path" not in section:
            facts = self.caches[name].facts
            return common_rows(student, facts.head_rows, vocab_size, facts.what)
        size = pair.check_pair(self.config, self.processor, student, section, where)
        self.models[where] = pair.model_config(section, where, reads_pictures(student))
        pair.check_weights(section, where)
        return size

    def check_forward(self) -> None:
        """Whether both models run in packed rows, or in padded batches, as their own forward would."""
        sections = [self.config.get("student", {}), *teacher_sections(self.config).values()]
        if self.processor is None or any(section.get("trust_remote_code") for section in sections):
            return  # of code that comes with the weights, the trainer asks
        forbidden = placeholder_ids(self.models["student"])
        check_routers("student", self.models["student"])
        check_text_view(self.processor, forbidden, **self.template_options)
        groups = check_prompts(self.processor, forbidden, **self.template_options)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        for config in self.models.values():
            way_of(pair.model_class(config), config, groups, device)

    def open_data(self) -> None:
        """Files and columns."""
        for part, section in self.config.get("data", {}).items():
            with config_errors(f"data.{part}", TypeError):
                column = self.args.teacher_column
                self.samples[part] = open_samples(DataSource(**section, kept=() if column is None else (column,)))
        if self.caches or self.building:  # as opened: later, rows that cannot be used are gone
            rows = data_fingerprint(self.samples["train"])
            self.cached_data = f"{rows} up to {self.args.max_prompt_length} tokens"
        for cache in self.caches.values():
            cache.check(data=self.cached_data)

    def fingerprints(self) -> dict[str, str]:
        """A hash of each part of the data, as it was opened."""
        return {part: data_fingerprint(samples) for part, samples in self.samples.items()}

    def check_data_rows(self) -> None:
        """Every row; what was found is kept on the disk, and each later start reads it there."""
        for part, samples in self.samples.items():
            self.samples[part] = samples = good_rows(samples, self.processor, self.progress)
            check_routes(samples, f"data.{part}", self.args.teacher_column, list(teacher_sections(self.config)))
            if trainer_kind(self.config) == "self":
                control = self.args.privileged_control
                check_columns(samples, f"data.{part}", f"preset={self.args.preset!r}", control)
        if "train" in self.samples and self.processor is not None and not self.digits:
            self._check_recorded()
        if "train" in self.samples and trainer_kind(self.config) != "self":
            preset = self.args.preset_in_force
            check_teacher_kind(preset, ("separate",), "this trainer")
            compares = needs_teacher(self.config) and preset.needs_text(self.args.objective(1.0))
            student = self.models.get("student")
            blind = compares and student is not None and not reads_pictures(student)
            if blind and not marks_evidence(self.samples["train"]):
                raise pair.no_pictures(self.config["student"], "student", student)
            check_columns_for(preset, self.samples["train"], compares)

    def _check_recorded(self) -> None:
        """Recorded responses, where the run learns from some."""
        values = self.samples["train"].column("responses")
        fraction = getattr(self.args, "on_policy_fraction", 1)
        sections = teacher_sections(self.config).values()
        cached = bool(sections) and all("cache" in section for section in sections)
        if fraction < 1 and values is None and not cached and not self.building:
            raise ConfigError(f"on_policy_fraction {fraction} needs data.train.responses, or a cache of each teacher.")
        if fraction == 1 and values is not None and not self.building:
            raise ConfigError("data.train.responses has no effect with on_policy_fraction 1: the student samples all.")
        if values is not None:
            student = self.models["student"]
            rows = self.args.vocab_size or head_rows(student)
            options = {"forbidden": placeholder_ids(student), "vocabulary": rows, **self.template_options}
            check_recorded(self.samples["train"], "data.train", values, self.processor, self.args, **options)

    def measure_prompts(self) -> None:
        """Training prompts longer than ``max_prompt_length`` are dropped; the longest of the others is known then."""
        if self.processor is None:
            return
        limit = self.args.max_prompt_length
        for part, samples in self.samples.items():
            lengths = prompt_lengths(samples, self.processor, **self.template_options)
            long = [samples.indices[i] for i, length in enumerate(lengths) if limit is not None and length > limit]
            if long and part == "train":
                self.samples[part] = keep_short_prompts(samples, lengths, limit)
                lengths = [length for length in lengths if length <= limit]
            elif long:  # whoever drops them would measure on another set
                logger.warning(
                    "data.%s: %d of %d prompts are longer than %d tokens; they are answered all the same (rows %s).",
                    *(part, len(long), len(samples), limit, listed(long)),
                )
            self.longest = max([self.longest or 0, *lengths])

    def count_steps(self) -> None:
        """Steps of the run, and rows that they leave out."""
        sizes = {**{name: key.default for name, key in DIGITS.items()}, **self.config.get("digits", {})}
        if self.digits:
            for name in ("train_size", "eval_size"):
                if sizes[name] < 1:
                    raise ConfigError(f"digits.{name} must be at least 1, got {sizes[name]}.")
        elif "train" not in self.samples:
            return
        rows = sizes["train_size"] if self.digits else len(self.samples["train"])
        self.steps = plan_steps(rows, self.args, processes())
        say_steps(self.steps, rows)

    def check_budgets(self) -> None:
        """Prompt and response against the models' contexts, vLLM's, and the tokens of a pass."""
        if not self.digits:
            budgets.check_lengths(self.args, self.longest, self.models)

    def check_room(self) -> None:
        """Room for checkpoints."""
        if "student" in self.models:
            needed = budgets.checkpoint_bytes(self.models["student"], self.args, self.config.get("lora"))
            budgets.check_disk(self.args.output_dir, needed, self.args, self.steps)
