"""Responses of a model to image questions: greedy ones for accuracies, sampled ones for the KL gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.prompts import encode_prompts
from ..data.responses import cut_responses
from ..models.families import placeholder_ids


@torch.no_grad()
def sample_responses(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    progress: bool = True,
    **template_options: Any,
) -> list[list[int]]:
    """A response of the model to each sample.

    Args:
        model: a vision-language model; answers in eval mode and is left in the mode it came in.
        processor: its processor.
        samples: dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images).
        batch_size: prompts per generation.
        max_new_tokens: longest response, in tokens.
        temperature: of sampling from torch's global generator; 0 decodes greedily.
        progress: show a progress bar.
        **template_options: passed to ``apply_chat_template``.

    Returns:
        Token ids of each response, up to and including the end token.
    """
    was_training = model.training
    model.eval()
    tokenizer, responses = processor.tokenizer, []
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    options = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    for start in tqdm(range(0, len(samples), batch_size), desc="answering", disable=not progress):
        batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        ids, mask, fields = encode_prompts(processor, batch, **template_options)
        inputs = {"input_ids": ids, "attention_mask": mask, **fields}
        output = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            **options,
            max_new_tokens=max_new_tokens,
            suppress_tokens=placeholder_ids(model.config),
            pad_token_id=tokenizer.pad_token_id,
        )
        responses += cut_responses(output[:, ids.shape[1] :], ends)
    model.train(was_training)
    return responses
