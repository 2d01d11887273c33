"""How a model is asked: the same settings for rollouts, evaluation and the KL gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..data.prompts import encode_prompts
from ..data.responses import cut_responses
from ..models.families import placeholder_ids
from ..models.shared_prompts import prompts_once
from ..models.tokenizers import tokenizer_of
from ..models.wrappers import is_sharded, run_inside, unwrap
from .generation import Generation, generation_settings

#: Fields of ``GenerationConfig`` for greedy decoding; generation would warn of what only sampling reads.
GREEDY: Mapping[str, Any] = MappingProxyType(
    {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k", "min_p"))}
)


@dataclass(frozen=True)
class Sampling(Generation):
    """How a model is asked here: see ``Generation``.

    Attributes:
        greedy: take the likeliest token, and nothing of ``temperature``, ``top_p``, ``top_k`` and ``min_p``.
    """

    greedy: bool = True

    @classmethod
    def from_settings(cls, settings: Any, *, greedy: bool) -> Sampling:
        """As a trainer with these settings samples (or, greedily, evaluates).

        Args:
            settings: see ``generation_settings``.
            greedy: see the class.
        """
        return cls(greedy=greedy, **generation_settings(settings))

    def generation_config(self, model: nn.Module, tokenizer: Any) -> GenerationConfig:
        """What ``generate`` is given.

        Args:
            model: its end tokens end a response, and its placeholders of pictures are never sampled.
            tokenizer: its end token ends a response too; without a padding token it serves as one.
        """
        forbidden = {*placeholder_ids(model.config), *(self.generation_kwargs.get("suppress_tokens") or ())}
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "pad_token_id": padding,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": end_tokens(model, tokenizer),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            **self.generation_kwargs,
            "suppress_tokens": sorted(forbidden) or None,
        }
        if self.greedy:
            options |= GREEDY
        return GenerationConfig(**options, disable_compile=True)


def end_tokens(model: nn.Module, tokenizer: Any) -> list[int]:
    """Ids of the tokens that end a response: the tokenizer's, and those of the model's generation config."""
    found = model.generation_config.eos_token_id
    found = [] if found is None else found if isinstance(found, list) else [found]
    missing = tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found
    return [tokenizer.eos_token_id, *found] if missing else list(found)


@contextmanager
def own_generation_config(model: nn.Module) -> Iterator[None]:
    """Inside, a checkpoint's generation settings (``repetition_penalty``, ...) do not fill in what a call leaves open,
    and ranks that share a model's parameters run equally many forwards, however long their responses are.

    Args:
        model: an unwrapped (possibly PEFT) model; its end tokens stay in force.
    """
    inner = getattr(getattr(model, "base_model", None), "model", None)  # PEFT's wrapper hands its config on to it
    holders = [x for x in (model, inner) if isinstance(getattr(x, "generation_config", None), GenerationConfig)]
    before = [(holder.generation_config, getattr(holder, "_is_fsdp_managed_module", False)) for holder in holders]
    sharded = is_sharded(model)
    for holder, (config, managed) in zip(holders, before, strict=True):
        holder.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        # What transformers' generation looks at; accelerate's FSDP2 does not set it.
        holder._is_fsdp_managed_module = managed or sharded
    try:
        yield
    finally:
        for holder, (config, managed) in zip(holders, before, strict=True):
            holder.generation_config, holder._is_fsdp_managed_module = config, managed


def _generate(model: nn.Module, inputs: Mapping[str, Tensor], **options: Any) -> tuple[None, Tensor]:
    """A task of ``run_inside``: transformers runs the vision tower before the model's forward, so that FSDP2 has
    gathered the parameters around it only inside one."""
    with prompts_once(model):
        return None, model.generate(**inputs, **options)


@torch.no_grad()
def sample_responses(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    num_generations: int = 1,
    batch_size: int = 8,
    progress: bool = True,
) -> list[list[int]]:
    """A response of the model to each sample, or several: the model reads a prompt once for all of them.

    Args:
        model: a vision-language model; answers in eval mode and is left in the mode it came in.
        processor: its processor.
        samples: dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images).
        sampling: how it is asked; random numbers are those of torch's global generator.
        num_generations: responses to each sample, G; above 1 they must be sampled, not greedy.
        batch_size: responses per generation.
        progress: show a progress bar.

    Returns:
        Token ids of each response, up to and including the end token; those to one sample follow each other.

    Raises:
        ConfigError: a sample that cannot be encoded; its number is named.
    """
    tokenizer, responses, sharded = tokenizer_of(processor), [], is_sharded(model)
    config, forbidden = sampling.generation_config(model, tokenizer), placeholder_ids(model.config)
    config.num_return_sequences, prompts = num_generations, max(1, batch_size // num_generations)
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(samples), prompts), desc="answering", disable=not progress):
            batch = [samples[i] for i in range(start, min(start + prompts, len(samples)))]
            ids, mask, fields = encode_prompts(processor, batch, forbidden, first=start, **sampling.template_options)
            inputs = {"input_ids": ids, "attention_mask": mask, **fields}
            inputs = {name: value.to(model.device) for name, value in inputs.items()}
            task = partial(_generate, model, inputs, generation_config=config)
            with own_generation_config(model):
                _, output = run_inside(model, task) if sharded else task()
            responses += cut_responses(output[:, ids.shape[1] :], config.eos_token_id)
    finally:
        model.train(was_training)
    return responses


def respond(
    student: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    num_generations: int = 1,
    batch_size: int = 8,
    **settings: Any,
) -> list[list[list[int]]]:
    """The student's own responses, as ``vgs_step`` takes them: sampled, with placeholders of pictures forbidden.

    Each response has at least one token. So where all calls of an optimizer step, on all ranks, have equally many
    samples, the mean over the calls' losses is the loss of them all, and ``vgs_step`` needs no ``num_items``.

    Args:
        student: as the loop holds it, see ``vgs_step``; samples in eval mode and is left in the mode it came in. Where
            it is sharded (FSDP2, ZeRO-3), all ranks call with equally many samples.
        processor: its processor.
        samples: B dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images).
        num_generations: responses to each sample, G.
        batch_size: responses per generation.
        **settings: of ``Sampling``, such as ``max_new_tokens=512``; ``greedy`` is False if left out.

    Returns:
        For each sample its G responses, each the token ids up to and including the end token.

    Raises:
        ValueError: ``num_generations`` below 1.
        ConfigError: a sample that cannot be encoded; its number is named.
    """
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}.")
    sampling = Sampling(**{"greedy": False, **settings})
    shared = 1 if sampling.greedy else num_generations
    asked = [sample for sample in samples for _ in range(num_generations // shared)]
    options = {"num_generations": shared, "batch_size": batch_size, "progress": False}
    found = sample_responses(unwrap(student), processor, asked, sampling, **options)
    return [found[first : first + num_generations] for first in range(0, len(found), num_generations)]
