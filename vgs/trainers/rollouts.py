"""Rollouts of a TRL trainer: image tokens forbidden, greedy on demand, images expanded once in vLLM; then the sampled
batch as prompts with their responses, and which of these are right."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ..data.messages import fill_images, prompt_images, shared_format
from ..data.responses import response_texts
from ..errors import ConfigError
from ..evaluation.sampling import GREEDY
from ..models.groups import PromptGroup
from ..models.image_fields import join_images
from ..models.padding import token_fields
from ..models.shared_prompts import prompts_once
from .encoding import ENCODED, encoded_prompts

logger = logging.getLogger(__name__)


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
    trainer.generation_config = copy(trainer.generation_config)
    trainer.generation_config.update(**GREEDY)
    trainer.generation_kwargs = {**trainer.generation_kwargs, **GREEDY}
    engine = trainer.vllm_generation if trainer.use_vllm else None
    if engine is not None:
        temperature, engine.temperature = engine.temperature, 0.0
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = sampling
        if engine is not None:
            engine.temperature = temperature


def expand_images_once(engine: Any, unexpanded: Callable[[], list[list[int]]]) -> None:
    """Send prompts with one mark per image to a colocated vLLM, which expands them itself, and check what it made.

    TRL 1.16 sends the processor's already expanded prompts, whose placeholders vLLM expands again: responses to a
    broken prompt, or a crash (TRL issues 6294 and 6401). In server mode TRL needs the expanded prompts.

    Args:
        engine: TRL's ``VLLMGeneration``, in colocate mode; its ``generate`` is replaced.
        unexpanded: gives the token ids of the prompts at hand as their chat template writes them.
    """
    original = engine.generate

    def generate(*, prompts: list[list[int]], images: Any, **options: Any) -> tuple:
        result = original(prompts=prompts if images is None else unexpanded(), images=images, **options)
        for index, (ours, theirs) in enumerate(zip(prompts, result[0], strict=True)):
            if list(ours) != list(theirs):
                raise RuntimeError(
                    f"vLLM and the processor disagree about prompt {index}: {len(theirs)} tokens and {len(ours)}. Both "
                    "must resize images alike; give vLLM the processor's image size, or use vllm_mode='server'."
                )
        return result

    engine.generate = generate


@dataclass(frozen=True)
class Questions:
    """What a host is asked to sample responses to: prompts as we encode them, which it must not do again.

    Attributes:
        samples: B, one per response.
        groups: the prompts, without responses, each of ``count`` neighbouring samples.
        count: responses to each prompt.
    """

    samples: list[dict[str, Any]]
    groups: list[PromptGroup]
    count: int

    @property
    def rows(self) -> list[PromptGroup]:
        """The prompt of each of the B responses."""
        return [group for group in self.groups for _ in range(self.count)]

    @property
    def host_samples(self) -> list[dict[str, Any]]:
        """The samples without their images, which the host would prepare a second time."""
        return [{name: x for name, x in sample.items() if name not in ("image", "images")} for sample in self.samples]

    @property
    def host_prompts(self) -> tuple[list[list[int]], None, dict[str, Any]]:
        """What the host's own tokenization would have returned: token ids, no images, fields of the whole batch."""
        return as_host_prompts(self.rows)

    @property
    def host_messages(self) -> list[Any]:
        """The B conversations with their images, as the host gives them to reward functions."""
        return [fill_images(sample["prompt"], sample["images"]) for sample in self.samples]

    @property
    def images(self) -> list[list[Any]] | None:
        """The images of each response's prompt, for vLLM, which prepares them itself; None without any."""
        found = [prompt_images(messages) for messages in self.host_messages]
        return found if any(found) else None

    def answered(self, ids: Tensor, mask: Tensor) -> list[PromptGroup]:
        """The prompts with the responses of a host's padded batch.

        Args:
            ids, mask: [B, C] ``completion_ids`` and ``completion_mask``.
        """
        rows = zip(ids.cpu(), mask.bool().cpu(), strict=True)
        responses = [row[kept] for row, kept in rows]
        starts = range(0, len(responses), self.count)
        return [
            replace(group, responses=tuple(responses[first : first + self.count]))
            for group, first in zip(self.groups, starts, strict=True)
        ]


def as_host_prompts(rows: Sequence[PromptGroup]) -> tuple[list[list[int]], None, dict[str, Any]]:
    """Prompts as a host's tokenization returns them: token ids, no images, and the fields of all.

    Args:
        rows: one prompt each.
    """
    fields: dict[str, Any] = join_images([group.images for group in rows])
    fields |= {name: [x.tolist() for x in values] for name, values in token_fields(rows).items()}
    return [group.prompt_ids.tolist() for group in rows], None, fields


@contextmanager
def several_answers(trainer: Any, count: int) -> Iterator[None]:
    """Make ``generate`` sample ``count`` responses to each prompt that it is given, one behind the other.

    The model reads each prompt with its images once then, instead of once for every response.
    """
    before = trainer.generation_config
    trainer.generation_config = copy(before)
    trainer.generation_config.num_return_sequences = count
    try:
        with prompts_once(trainer.student):
            yield
    finally:
        trainer.generation_config = before


def encode_questions(trainer: Any, inputs: Sequence[dict[str, Any]], count: int) -> Questions:
    """The prompts of a generation batch, each encoded once.

    Args:
        trainer: with ``processing_class``, ``placeholder_ids`` and ``args``.
        inputs: samples, one per response; those to one prompt follow each other.
        count: responses to each prompt.

    Raises:
        ConfigError: a sample that cannot be encoded, or is longer than ``max_prompt_length``.
        ValueError: neighbours that should share a prompt do not.
    """
    samples = [shared_format(x) for x in inputs]
    for first in range(0, len(samples), count):
        if any(x["prompt"] != samples[first]["prompt"] for x in samples[first : first + count]):
            raise ValueError(
                f"prompts {first} to {first + count - 1} differ, expected {count} responses to one prompt."
            )
    own = samples[::count]
    groups = encoded_prompts(trainer, own)
    for sample in samples:
        sample.pop(ENCODED, None)
    check_prompt_lengths([group.prompt_ids for group in groups], trainer.args.max_prompt_length, trainer.model.training)
    return Questions(samples, groups, count)


def rollout(
    trainer: Any, inputs: list[dict[str, Any]], num_generations: int
) -> tuple[dict[str, Any], list[PromptGroup]]:
    """The student samples: what the host makes of it, and the prompts with their responses. The accuracy is logged.

    Args:
        trainer: with ``HostHooks``, ``scorer`` and ``placeholder_ids``.
        inputs: samples, one per response; those to one prompt follow each other.
        num_generations: responses to each prompt.
    """
    questions = encode_questions(trainer, inputs, num_generations)
    output, tokenizer = trainer.host_rollout(questions), trainer.processing_class
    answers, training = [x.get("answer") for x in inputs], trainer.model.training
    if correct := right_answers(trainer.accelerator, tokenizer, output, answers, trainer.scorer, training):
        trainer.open_metrics["accuracy"].extend(correct)
    return output, questions.answered(output["completion_ids"], output["completion_mask"])


def check_prompt_lengths(prompts: Sequence[Sequence[int]], limit: int | None, training: bool) -> None:
    """Stop at a prompt that is too long. In evaluation it counts like any other, and a line says so.

    Args:
        prompts: token ids.
        limit: ``max_prompt_length``; None for any length.
        training: False in evaluation.

    Raises:
        ConfigError: such a prompt in training.
    """
    longest = max(map(len, prompts))
    if limit is None or longest <= limit:
        return
    if not training:
        count = sum(len(prompt) > limit for prompt in prompts)
        logger.warning(
            "%d prompts of an evaluation batch are longer than %d tokens: answered all the same.", count, limit
        )
    else:
        raise ConfigError(
            f"A prompt has {longest} tokens, more than max_prompt_length={limit}. Filter the dataset "
            "(vgs.data.lengths.drop_long_prompts) or raise the limit; prompts are never truncated."
        )


def right_answers(
    accelerator: Accelerator,
    tokenizer: Any,
    output: dict[str, Any],
    answers: Sequence[str | None],
    scorer: Callable[[str, str], bool],
    training: bool,
) -> list[float]:
    """Which responses of a sampled batch are right, over all ranks: 1.0, 0.0, or NaN without a gold answer.

    Args:
        accelerator: knows the processes.
        tokenizer: decodes the responses.
        output: ``completion_ids`` and ``completion_mask`` [B, C], as TRL's on-policy trainers have them.
        answers: B gold answers; None where there is none.
        scorer: ``scorer(response_text, gold_answer) -> bool``.
        training: False in evaluation, where samples that fill up the last batch are dropped.

    Returns:
        One value per response, so that the mean of several batches of any size weighs right; empty without any gold
        answer.
    """
    kept = [ids[mask.bool()] for ids, mask in zip(output["completion_ids"], output["completion_mask"], strict=True)]
    texts = response_texts(tokenizer, kept)
    # Without a gold answer: NaN, so that every rank gathers as many values.
    correct = [math.nan if gold is None else scorer(text, gold) for text, gold in zip(texts, answers, strict=True)]
    values = torch.tensor(correct, dtype=torch.float32, device=output["completion_ids"].device)
    values = accelerator.gather(values) if training else accelerator.gather_for_metrics(values)
    return [] if values.isnan().all() else values.tolist()


def samples_of(inputs: Sequence[dict[str, Any]], groups: Sequence[PromptGroup]) -> list[dict[str, Any]]:
    """The sample of each group, of ``inputs`` with one per response."""
    ends = accumulate(len(group.responses) for group in groups)
    return [inputs[end - 1] for end in ends]
