"""What a teacher is taken from, as a config's section ``teacher`` says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import ConfigError
from .cache import StateCache


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher's hidden states come from: a model, a server or a cache; a cache also beside one of the others.

    Args:
        model: a vision-language model, or its id, which the trainer loads.
        options: of ``from_pretrained``, for an id.
        url: of a server that ``vgs serve-teacher`` runs, such as ``"http://127.0.0.1:8017"``.
        token_file: with the server's token; None: it is in the environment, see ``vgs.teachers.served``.
        cache: a folder of ``vgs cache-teacher``, for responses that are recorded; or that folder as it was opened.

    Raises:
        ConfigError: none of them, a model and a url, or options without a model's id.
    """

    model: str | nn.Module | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    url: str | None = None
    token_file: str | None = None
    cache: str | StateCache | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.url is not None:
            raise ConfigError(f"a teacher has a path or a url, got both: {self.model!r} and {self.url!r}.")
        if self.model is None and self.url is None and self.cache is None:
            raise ConfigError("a teacher needs a path, a url or a cache, got none of them.")
        if self.options and not isinstance(self.model, str):
            raise ConfigError(f"options of from_pretrained belong to a teacher's path, got {dict(self.options)}.")
        if self.token_file is not None and self.url is None:
            raise ConfigError(f"token_file belongs to a teacher's url, got {self.token_file!r} without one.")

    @property
    def live(self) -> bool:
        """Whether it can score any response."""
        return self.model is not None or self.url is not None


def as_sources(teacher_model: Any) -> dict[str, TeacherSource]:
    """The teachers that a trainer is given, by name; one alone has the name "".

    Args:
        teacher_model: a model, its id, a ``TeacherSource``, or a mapping from names to these; None for none.

    Raises:
        ConfigError: a mapping without entries, or with names that are no texts.
    """
    if teacher_model is None:
        return {}
    if not isinstance(teacher_model, Mapping):
        return {"": teacher_model if isinstance(teacher_model, TeacherSource) else TeacherSource(teacher_model)}
    if not teacher_model or not all(isinstance(name, str) and name for name in teacher_model):
        raise ConfigError(f"teachers must have names that are texts, got {list(teacher_model)}.")
    return {
        name: given if isinstance(given, TeacherSource) else TeacherSource(given)
        for name, given in teacher_model.items()
    }
