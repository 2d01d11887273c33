"""A config's student and its separate teacher, as both score answers to questions of its eval data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..data.prompts import encode_groups
from ..errors import ConfigError
from ..evaluation.kl_gap import on_policy
from ..evaluation.sampling import Sampling
from ..models.families import placeholder_ids
from ..models.groups import PromptGroup
from ..models.heads import Head, output_layer
from ..models.vocabulary import common_rows
from ..teachers.local import LocalTeacher
from ..teachers.protocol import Teacher
from ..trainers.kinds import needs_teacher, teacher_sections, trainer_kind
from .runs import Measured, digits_teacher, load_for_eval
from .teacher import open_teacher


@dataclass(frozen=True)
class ScoredPair:
    """Two models on one set of questions.

    Attributes:
        found: the student and what it is measured on. samples: of the one set.
        teacher: ready to score.
        vocab_size: leading columns that both heads have in common; None for all.
    """

    found: Measured
    samples: Any
    teacher: Teacher
    vocab_size: int | None

    @contextmanager
    def scoring(self) -> Iterator[Head]:
        """Models compute inside as in training; gives the teacher's head."""
        with self.found.as_trained(), self.teacher.head(output_layer(self.found.model).weight.dtype) as head:
            yield head

    def answers(self, samples: Sequence[Mapping[str, Any]], **options: Any) -> list[list[int]]:
        """Token ids of an answer to each sample, which the student samples as it does in training.

        Args:
            samples: of the set. options: see ``on_policy``.
        """
        sampling = Sampling.from_settings(self.found.args, greedy=False)
        return on_policy(self.found.model, self.found.processor, samples, sampling, **options)

    def groups(
        self, samples: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[PromptGroup]:
        """Prompts with and without images, and their answers.

        Args:
            samples: of the set. answers: token ids of some to each.
        """
        found, device = self.found, output_layer(self.found.model).weight.device
        forbidden = placeholder_ids(found.model.config)
        return encode_groups(found.processor, samples, answers, forbidden, device, **found.template_options)


def open_pair(config: Mapping[str, Any], model: str | None, command: str) -> ScoredPair:
    """Load what a config compares.

    Args:
        config: of ``load_config``. model: a saved student's path; None for the config's.
        command: that needs it, for messages.

    Raises:
        ConfigError: a config without one separate teacher or without one set of eval data, or a model that cannot be
            loaded.
    """
    if trainer_kind(config) == "self":
        raise ConfigError(f"{command} needs a separate teacher, which self-distillation has not.")
    if not needs_teacher(config):
        raise ConfigError(f"{command} needs a separate teacher, which GRPO alone (training.alpha: 0) has not.")
    if "teachers" in config:
        raise ConfigError(f"{command} needs one teacher, got section 'teachers'.")
    found = load_for_eval(config, model)
    if "" not in found.sets:
        names = ", ".join(found.sets)
        raise ConfigError(f"{command} measures one set, but data.eval has {len(found.sets)}: {names}.")
    device = output_layer(found.model).weight.device
    if config.get("task") == "digits":
        teacher: Any = LocalTeacher(digits_teacher(config).to(device).eval())
    else:
        teacher = open_teacher(teacher_sections(config)[""], found.args, device, command)
    vocab_size = common_rows(found.model.config, teacher.facts.head_rows, found.args.vocab_size)
    return ScoredPair(found, found.sets[""], teacher, vocab_size)
