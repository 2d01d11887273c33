"""What a host's two models are asked before a run: whether they read the same tokens, and how they may run."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import ProcessorMixin

from ..data.check_prompts import check_prompts
from ..data.prompts import check_text_view
from ..errors import ConfigError, config_errors
from ..models.families import placeholder_ids
from ..models.routers import check_routers
from ..models.self_check import chosen_way
from ..models.tokenizers import check_same_tokens
from ..models.wrappers import unwrap


def check_models(
    student: nn.Module,
    teacher: nn.Module,
    processor: Any,
    *,
    needs_images: bool,
    vocab_size: int | None = None,
    teacher_tokenizer: Any = None,
    template_options: dict[str, Any] | None = None,
) -> list[str]:
    """Ask both models how they run (``vgs.models.self_check``), or refuse them. All ranks must call.

    Args:
        student, teacher: as the host holds them.
        processor: the student's.
        needs_images: whether the objective compares prompts with and without images.
        vocab_size: leading columns of both heads that the loss uses.
        teacher_tokenizer: None where the teacher has none of its own.
        template_options: for the chat template.

    Returns:
        The way of the student and that of the teacher: "packed", "padded" or "repeated".

    Raises:
        ConfigError: a model that cannot be run in batches as its own forward would; other tokens; a student without
            images for an objective that needs them, or whose config asks for a loss of its router.
    """
    models = [unwrap(student), unwrap(teacher)]
    own, theirs = (placeholder_ids(model.config) for model in models)
    if own != theirs:
        raise ConfigError(f"the teacher has image and video token ids {theirs}, the student {own}; expected the same.")
    if needs_images and not (own and isinstance(processor, ProcessorMixin)):
        raise ConfigError(
            f"the student must be a vision-language model with a processor, got {type(models[0]).__name__} with "
            f"{type(processor).__name__}: this objective compares prompts with and without images."
        )
    check_routers("the student", models[0].config)
    options = template_options or {}
    check_text_view(processor, own, **options)
    if teacher_tokenizer is not None:
        with config_errors("the teacher's tokenizer", ValueError):
            check_same_tokens(processor, teacher_tokenizer, vocab_size)
    prompts = check_prompts(processor, own, **options)
    return [chosen_way(model, prompts) for model in models]
