"""What every trainer does once its host has the models: checks, forbidden tokens, frozen parts."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn
from transformers import ProcessorMixin

from ..data.check_prompts import check_prompts
from ..data.messages import remove_evidence
from ..data.prompts import anchor_group, check_text_view, encode_prompt
from ..errors import ConfigError
from ..models.families import freeze, placeholder_ids
from ..models.groups import PromptGroup
from ..models.kernel_limits import check_kernel
from ..models.routers import check_routers
from ..models.self_check import packs
from ..models.vocabulary import head_rows
from ..teachers.fingerprints import autocast_name, computing_versions, rendering_fingerprint, weights_fingerprint
from .checks import (
    check_columns_for,
    check_engine,
    check_logits,
    check_overlap,
    check_placeholders,
    check_student,
    check_teacher_kind,
    check_top_k,
    marks_evidence,
)
from .rollouts import expand_images_once, forbid_tokens
from .routes import OpenedTeacher, check_routes, settle_vocabulary
from .vocabulary import unknown_to_teachers

logger = logging.getLogger(__name__)


def prepare_models(trainer: Any, kinds: tuple[str, ...]) -> None:
    """Check that models, data and settings fit, and freeze what is to stay. Sets ``placeholder_ids``, which are never
    sampled, ``anchor`` and ``packs`` (see ``StepScorer``).

    Args:
        trainer: with ``HostHooks`` and ``opened`` teachers; one whose model is ``model`` is the student itself.
        kinds: of teacher that it has, of ``vgs.objectives.presets.TEACHERS``.

    Raises:
        ConfigError: see ``checks``.
    """
    args, student = trainer.args, trainer.student
    preset, accelerator, opened = args.preset_in_force, trainer.accelerator, trainer.opened
    trainer.placeholder_ids = placeholder_ids(trainer.model.config)
    check_teacher_kind(preset, kinds, type(trainer).__name__)
    # In GRPO alone the student is compared with itself.
    compares = trainer.teacher_model is not trainer.model and preset.needs_text(args.objective(1.0))
    check_columns_for(preset, trainer.train_dataset, compares)
    for what, data in (("train_dataset", trainer.train_dataset), ("eval_dataset", trainer.eval_dataset)):
        for part in data.values() if isinstance(data, dict) else [data]:
            check_routes(part, what, args.teacher_column, list(opened))
    has_processor = isinstance(trainer.processing_class, ProcessorMixin)
    sees = bool(trainer.placeholder_ids)  # else texts are all the evidence there can be
    check_student(student, has_processor, compares and (sees or not marks_evidence(trainer.train_dataset)))
    check_routers("model", student.config)
    check_kernel("model", student, args.packed_attention, accelerator.device)
    check_text_view(trainer.processing_class, trainer.placeholder_ids, **trainer.chat_template_kwargs)
    prompts = check_prompts(trainer.processing_class, trainer.placeholder_ids, **trainer.chat_template_kwargs)
    words = _words(trainer)
    check_logits("model", student, words)
    if not any(found.source.model is not None for found in opened.values()):
        check_engine(args, None, accelerator.distributed_type, accelerator.is_fsdp2)
    # All are asked, on every rank; a teacher that is loaded for it is given up before the next.
    answers = [packs(student, prompts), *[_check_teacher(trainer, x, words, prompts) for x in opened.values()]]
    trainer.packs = all(answers)
    settle_vocabulary(args, student.config, opened)
    columns = args.vocab_size or head_rows(student.config)
    check_top_k(preset, columns)
    check_overlap(args.log_overlap, columns)
    unknown = unknown_to_teachers(student.config, min(found.facts.head_rows for found in opened.values()))
    forbid_tokens(trainer, [*trainer.placeholder_ids, *unknown])
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        expand_images_once(trainer.vllm_generation, trainer.unexpanded_prompts)
    freeze(student, vision=args.freeze_vision, embeddings=args.freeze_embeddings)
    trainer.anchor = anchor_prompt(trainer)
    if preset.steered and args.unguarded is not None:
        logger.info("gamma is not guarded: %s.", args.unguarded)


def _check_teacher(trainer: Any, found: OpenedTeacher, words: Tensor, prompts: list[PromptGroup]) -> bool:
    """One teacher against the student; whether it runs in packed rows, as far as that is decided here."""
    args, student, accelerator = trainer.args, trainer.student, trainer.accelerator
    with found.here() as teacher:
        check_placeholders(student, found.facts)
        if found.remote is not None:
            found.remote.check(trainer.processing_class, student.config, args.vocab_size)
        if found.cache is not None:
            check_cache(trainer, found, teacher)
        if teacher is None:
            return True
        check_engine(args, teacher, accelerator.distributed_type, accelerator.is_fsdp2)
        check_kernel(found.what, teacher, args.packed_attention, accelerator.device)
        check_logits(found.what, teacher, words)
        return packs(teacher, prompts)


def check_cache(trainer: Any, found: OpenedTeacher, teacher: nn.Module | None) -> None:
    """Stop at a cache that was made from something else than this run has.

    Args:
        trainer: see ``prepare_models``.
        found: its teacher.
        teacher: the teacher's unwrapped model; None where it does not run here.

    Raises:
        ConfigError: see ``StateCache.check``; or states of views that the run needs and the cache has not.
    """
    args, preset = trainer.args, trainer.args.preset_in_force
    now = {
        "rendering": rendering_fingerprint(
            trainer.processing_class, trainer.placeholder_ids, **trainer.chat_template_kwargs
        ),
        "autocast": autocast_name(args),
        "versions": computing_versions(),
    }
    if found.source.live:
        now["weights"] = weights_fingerprint(teacher) if found.remote is None else found.remote.weights
    found.cache.check(**now)
    if args.num_generations > found.cache.manifest.per_prompt:
        raise ConfigError(
            f"{found.cache.facts.what} has {found.cache.manifest.per_prompt} responses to each prompt, fewer than "
            f"num_generations={args.num_generations}."
        )
    views = {view for model, view in preset.rows if model == "teacher"} - {"text"}
    text = preset.scores_text(args.objective(1.0), args.log_terms)
    wanted = sorted(views | ({"text"} if text else set()))
    if missing := [view for view in wanted if view not in found.cache.manifest.views]:
        raise ConfigError(
            f"{found.cache.facts.what} has the views {', '.join(found.cache.manifest.views)}, but preset="
            f"{preset.name!r} needs {missing[0]!r}: make it anew with this config, or train without it."
        )


def _words(trainer: Any) -> Tensor:
    """[T] int64, a short text."""
    words, _ = encode_prompt(
        trainer.processing_class,
        remove_evidence([{"role": "user", "content": "."}]),
        chat_template=trainer.chat_template,
        **trainer.chat_template_kwargs,
    )
    return words


def anchor_prompt(trainer: Any) -> PromptGroup:
    """What a pass without responses runs, so that ranks run the same: see ``vgs.models.forward.score_with_anchor``."""
    options = {"device": trainer.accelerator.device, **trainer.chat_template_kwargs}
    return anchor_group(trainer.processing_class, trainer.placeholder_ids, **options)
