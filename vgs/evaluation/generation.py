"""Settings by which a model answers, wherever it is asked; neither torch nor transformers is needed to read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_NEW_TOKENS = 2048  # the paper's longest response
#: Field of the trainers' settings -> field of ``Generation``.
SETTINGS = {
    "max_completion_length": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "generation_kwargs": "generation_kwargs",
    "chat_template_kwargs": "template_options",
}


@dataclass(frozen=True)
class Generation:
    """How a model answers.

    Attributes:
        max_new_tokens: longest response, in tokens.
        temperature, top_p, top_k, min_p, repetition_penalty: of ``transformers.GenerationConfig``. The checkpoint's own
            settings do not count.
        generation_kwargs: further fields of ``GenerationConfig``.
        template_options: passed to ``apply_chat_template``, such as ``{"enable_thinking": False}``.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: Mapping[str, Any] = field(default_factory=dict)
    template_options: Mapping[str, Any] = field(default_factory=dict)


def generation_settings(settings: Any) -> dict[str, Any]:
    """Fields of ``Generation`` as a trainer with these settings samples; what they leave open is left out.

    Args:
        settings: a ``VGSConfig`` or another trainer's settings, or a mapping of some of its fields.
    """
    given = settings if isinstance(settings, Mapping) else vars(settings)
    return {own: given[name] for name, own in SETTINGS.items() if given.get(name) is not None}
