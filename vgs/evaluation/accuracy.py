"""Responses of a model to image questions, and its greedy accuracy, without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..data.answers import answers_match
from ..data.prompts import encode_prompts
from ..errors import ConfigError
from ..models.families import placeholder_ids


@torch.no_grad()
def sample_responses(
    model: nn.Module,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    **template_options: Any,
) -> list[list[int]]:
    """A response of the model to each sample.

    Args:
        model: a vision-language model; answers in eval mode and is left in the mode it came in.
        processor: its processor.
        samples: dicts with ``prompt`` and ``images``.
        batch_size: prompts per generation.
        max_new_tokens: longest response.
        temperature: of sampling from torch's global generator; 0 decodes greedily.
        **template_options: passed to ``apply_chat_template``.

    Returns:
        Token ids, up to and including the end token.
    """
    was_training = model.training
    model.eval()
    tokenizer, responses = processor.tokenizer, []
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    options = {"do_sample": False}
    if temperature > 0:
        options = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    for start in tqdm(range(0, len(samples), batch_size), desc="answering"):
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
        for row in output[:, ids.shape[1] :].tolist():
            ended = (place + 1 for place, token in enumerate(row) if token in ends)
            responses.append(row[: next(ended, len(row))])
    model.train(was_training)
    return responses


def evaluate_accuracy(
    model: nn.Module,
    processor: Any,
    samples: Any,
    scorer: Callable[[str, str], bool] = answers_match,
    batch_size: int = 8,
    max_new_tokens: int = 2048,
) -> dict[str, float]:
    """Answer every sample greedily and count the right answers.

    Args:
        model, processor, batch_size, max_new_tokens: see ``sample_responses``.
        samples: sequence of dicts with ``prompt``, ``images`` and ``answer``; None: there is no gold answer, and the
            sample does not count.
        scorer: ``scorer(response_text, gold_answer) -> bool``.

    Returns:
        ``accuracy`` (fraction), ``samples`` (those with a gold answer) and ``mean_length`` (tokens per response).

    Raises:
        ConfigError: no sample has a gold answer.
    """
    answers = sample_responses(model, processor, samples, batch_size=batch_size, max_new_tokens=max_new_tokens)
    texts = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
    golds = [samples[i]["answer"] for i in range(len(samples))]
    right = [scorer(text, gold) for text, gold in zip(texts, golds, strict=True) if gold is not None]
    if not right:
        raise ConfigError(f"None of the {len(samples)} samples has a gold answer: there is no accuracy to compute.")
    tokens = sum(map(len, answers))
    return {"accuracy": sum(right) / len(right), "samples": len(right), "mean_length": tokens / len(samples)}
