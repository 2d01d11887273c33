"""Sampling through the host trainer: image tokens forbidden, greedy on demand, and images expanded once in vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any


def forbid_tokens(trainer: Any, token_ids: Sequence[int]) -> None:
    """Keep a trainer from sampling tokens, with HF ``generate`` and with vLLM.

    A sampled image or video token claims pixels that do not exist, and crashes the rope index.

    Args:
        trainer: a ``trl.DistillationTrainer``.
        token_ids: the tokens, in addition to the user's ``generation_kwargs["suppress_tokens"]``.
    """
    user = (trainer.args.generation_kwargs or {}).get("suppress_tokens") or []
    suppressed = sorted({*token_ids, *user})
    trainer.generation_kwargs["suppress_tokens"] = suppressed
    trainer.generation_config.suppress_tokens = suppressed
    if trainer.use_vllm:  # vLLM has no such option; -100 is the smallest bias it takes
        options = trainer.vllm_generation.generation_kwargs
        bias = {**dict.fromkeys(token_ids, -100.0), **(options.get("logit_bias") or {})}
        trainer.vllm_generation.generation_kwargs = {**options, "logit_bias": bias}


@contextmanager
def greedy_decoding(trainer: Any) -> Iterator[None]:
    """Make a trainer decode greedily; its sampling is restored afterwards."""
    sampling = trainer.generation_config, trainer.generation_kwargs
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    trainer.generation_config = copy(trainer.generation_config)
    trainer.generation_config.update(**greedy)
    trainer.generation_kwargs = {**trainer.generation_kwargs, **greedy}
    engine = trainer.vllm_generation if trainer.use_vllm else None
    if engine is not None:
        temperature, engine.temperature = engine.temperature, 0.0
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = sampling
        if engine is not None:
            engine.temperature = temperature


def collapse_runs(ids: Sequence[int], token_id: int) -> list[int]:
    """Token ids with every run of ``token_id`` shortened to one."""
    return [token for i, token in enumerate(ids) if token != token_id or i == 0 or ids[i - 1] != token_id]


def expand_images_once(engine: Any, image_token_id: int) -> None:
    """Send one placeholder per image to a colocated vLLM, which expands it itself, and check what it made of it.

    TRL 1.16 sends the processor's already expanded prompts, whose placeholders vLLM expands again: responses to a
    broken prompt, or a crash (TRL issues 6294 and 6401). In server mode TRL needs the expanded prompts.

    Args:
        engine: TRL's ``VLLMGeneration``, in colocate mode; its ``generate`` is replaced.
        image_token_id: the placeholder; each image is one run of it.
    """
    original = engine.generate

    def generate(*, prompts: list[list[int]], images: Any, **options: Any) -> tuple:
        sent = prompts if images is None else [collapse_runs(ids, image_token_id) for ids in prompts]
        result = original(prompts=sent, images=images, **options)
        for index, (ours, theirs) in enumerate(zip(prompts, result[0], strict=True)):
            if list(ours) != list(theirs):
                raise RuntimeError(
                    f"vLLM and the processor disagree about prompt {index}: {len(theirs)} tokens and {len(ours)}. Both "
                    "must resize images alike; give vLLM the processor's image size, or use vllm_mode='server'."
                )
        return result

    engine.generate = generate
