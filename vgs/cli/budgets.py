"""What a run needs and may not find: packages, context length, tokens of a pass, room on the disk."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..planning.memory import GIB, optimizer_bytes, tensor_bytes
from ..trainers.settings import view_count
from .steps import Steps

logger = logging.getLogger(__name__)


def check_versions(args: Any) -> None:
    """Stop where a package that the settings ask for is missing.

    Raises:
        ConfigError: such a package.
    """
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )
    from trl.import_utils import is_vllm_available

    if getattr(args, "use_vllm", False) and not is_vllm_available():
        raise ConfigError("use_vllm needs vLLM in a version that TRL supports: pip install 'vgs-kernels[vllm]'.")
    wanted = [name for name in args.report_to or () if name not in ("none", "all")]
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"report_to must be none or some of {', '.join(INTEGRATION_TO_CALLBACK)}, got {name!r}.")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"report_to {name!r} needs a package that is not installed.")
    if args.deepspeed:
        from transformers.integrations import is_deepspeed_available

        if not is_deepspeed_available():
            raise ConfigError("deepspeed needs the package of this name: pip install deepspeed.")


def context_length(config: Any) -> int | None:
    """Most tokens that a model was made for, by its transformers config; None where it does not say."""
    text = config.get_text_config()
    length = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None)
    factor = rope.get("factor") if isinstance(rope, Mapping) else None
    if length is None or factor is None or "original_max_position_embeddings" in rope:
        return length
    return int(length * factor)


def check_lengths(args: Any, longest: int | None, models: Mapping[str, Any]) -> None:
    """Stop where a prompt and its response would be longer than something holds.

    Args:
        args: the trainer's settings.
        longest: tokens of the longest prompt in the data; None: only ``max_prompt_length`` is known.
        models: ``"student"`` and ``"teacher"``, their transformers configs.

    Raises:
        ConfigError: longer than a model's context, than vLLM's, or than a pass.
    """
    response = args.max_completion_length or 0
    if longest is None:
        longest = args.max_prompt_length
    if longest is None:
        return
    total = f"a prompt of {longest} tokens and a response of max_completion_length {response}"
    for name, config in models.items():
        context = context_length(config)
        if context is not None and longest + response > context:
            raise ConfigError(
                f"{total} make {longest + response}, more than the {context} that the {name} was made for; lower "
                "max_completion_length or max_prompt_length."
            )
    engine = getattr(args, "vllm_max_model_length", None)
    if args.use_vllm and engine is not None and longest + response > engine:
        raise ConfigError(f"{total} make {longest + response}, more than vllm_max_model_length {engine}.")
    views, budget = view_count(args), args.max_tokens_per_pass
    if budget is not None and views * (longest + response) > budget:
        raise ConfigError(
            f"{total} make {views * (longest + response)} tokens in {views} views, more than max_tokens_per_pass "
            f"{budget}."
        )


def checkpoint_bytes(student: Any, args: Any, lora: Mapping[str, Any] | None, item: int = 4) -> int | None:
    """Bytes of one checkpoint: weights and optimizer states; None for a model that cannot be counted.

    Args:
        student: its transformers config. args: the trainer's settings. lora: the config's section. item: bytes of a
            weight.
    """
    from ..planning.model_size import build_on_meta

    try:
        model = build_on_meta(student)
        if lora:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(**json.loads(json.dumps(lora))))
    except Exception as error:  # whatever a family's constructor does
        logger.debug("The student cannot be counted: %s", error)
        return None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved = trained if lora else list(model.parameters())
    states = 0 if args.save_only_model else optimizer_bytes(str(getattr(args.optim, "value", args.optim)), trained)
    return tensor_bytes(saved) * item // 4 + (states or 0)


def check_disk(output_dir: str | Path, needed: int | None, args: Any, steps: Steps | None) -> None:
    """Stop where not even one checkpoint fits on the disk; warn where not all of them do.

    Args:
        output_dir: of the run; it need not exist.
        needed: bytes of one checkpoint, of ``checkpoint_bytes``.
        args: the trainer's settings.
        steps: of the run; None: not known.

    Raises:
        ConfigError: less free space than one checkpoint takes.
    """
    if needed is None:
        return
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ConfigError(
            f"output_dir {str(output_dir)!r} has {free / GIB:.1f} GiB free, one checkpoint takes {needed / GIB:.1f}."
        )
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "steps" or steps is None:
        return
    every = args.save_steps if args.save_steps >= 1 else max(1, round(args.save_steps * steps.total))
    count = steps.total // every
    kept = min(count, args.save_total_limit or count) + (1 if args.save_total_limit else 0)
    if kept * needed > free:
        logger.warning(
            "%d checkpoints of %.1f GiB each will be kept, but output_dir has %.1f GiB free: set save_total_limit.",
            *(kept, needed / GIB, free / GIB),
        )
