"""What every trainer does once its host has the models: checks, forbidden tokens, frozen parts."""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin

from ..data.check_prompts import check_prompts
from ..data.messages import remove_images
from ..data.prompts import anchor_group, check_text_view, encode_prompt
from ..models.families import freeze, placeholder_ids
from ..models.groups import PromptGroup
from ..models.kernel_limits import check_kernel
from ..models.routers import check_routers
from ..models.self_check import packs
from .checks import check_columns_for, check_engine, check_logits, check_pair, check_teacher_kind, check_top_k
from .rollouts import expand_images_once, forbid_tokens
from .vocabulary import unknown_to_teacher


def prepare_models(trainer: Any, teachers: tuple[str, ...]) -> None:
    """Check that models, data and settings fit, set ``placeholder_ids``, forbid these, and freeze what is to stay.

    Args:
        trainer: with ``HostHooks`` and a ``teacher_model``, which is ``model`` where there is no other.
        teachers: the kinds of teacher that it has, of ``vgs.objectives.presets.TEACHERS``.

    Raises:
        ConfigError: see ``checks``.
    """
    args, student = trainer.args, trainer.student
    teacher, preset = trainer.accelerator.unwrap_model(trainer.teacher_model), args.preset_in_force
    trainer.placeholder_ids = placeholder_ids(trainer.model.config)
    check_teacher_kind(preset, teachers, type(trainer).__name__)
    check_top_k(preset, args.vocab_size or student.config.get_text_config().vocab_size)
    # In GRPO alone the student is compared with itself.
    compares = trainer.teacher_model is not trainer.model and preset.needs_text(args.objective(1.0))
    check_columns_for(preset, trainer.train_dataset, compares)
    check_pair(student, teacher, isinstance(trainer.processing_class, ProcessorMixin), compares)
    check_engine(args, teacher, trainer.accelerator.distributed_type)
    check_routers("model", student.config)
    for name, model in (("model", student), ("teacher_model", teacher)):
        check_kernel(name, model, args.packed_attention, trainer.accelerator.device)
    check_text_view(trainer.processing_class, trainer.placeholder_ids, **trainer.chat_template_kwargs)
    forbid_tokens(trainer, [*trainer.placeholder_ids, *unknown_to_teacher(student.config, teacher.config)])
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        expand_images_once(trainer.vllm_generation, trainer.unexpanded_prompts)
    words, _ = encode_prompt(
        trainer.processing_class,
        remove_images([{"role": "user", "content": "."}]),
        chat_template=trainer.chat_template,
        **trainer.chat_template_kwargs,
    )
    for name, model in (("model", student), ("teacher_model", teacher)):
        check_logits(name, model, words)
    freeze(student, vision=args.freeze_vision, embeddings=args.freeze_embeddings)


def both_pack(trainer: Any) -> bool:
    """Whether student and teacher run in packed rows.

    Raises:
        ConfigError: one of them cannot be run as its own forward would (``vgs.models.self_check``).
    """
    groups = check_prompts(trainer.processing_class, trainer.placeholder_ids, **trainer.chat_template_kwargs)
    models = [trainer.accelerator.unwrap_model(x) for x in (trainer.model, trainer.teacher_model)]
    answers = [packs(model, groups) for model in models]  # both are asked, on every rank
    return all(answers)


def anchor_prompt(trainer: Any) -> PromptGroup | None:
    """A prompt with a small image and one token to it, see ``vgs.models.forward.score_with_anchor``; None for a model
    that takes no images."""
    if not isinstance(trainer.processing_class, ProcessorMixin):
        return None
    options = {"device": trainer.accelerator.device, **trainer.chat_template_kwargs}
    return anchor_group(trainer.processing_class, trainer.placeholder_ids, **options)
