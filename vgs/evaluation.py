"""Greedy accuracy of a model on image questions, without a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .data import answers_match
from .pairing import encode_prompts, placeholder_ids


@torch.no_grad()
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
        model: a vision-language model; evaluated in eval mode and left in the mode it came in.
        processor: its processor.
        samples: sequence of dicts with ``prompt``, ``images`` and ``answer``.
        scorer: ``scorer(response_text, gold_answer) -> bool``.
        batch_size: prompts per generation.
        max_new_tokens: longest response.

    Returns:
        ``accuracy`` (fraction), ``samples`` and ``mean_length`` (tokens per response).
    """
    was_training = model.training
    model.eval()
    tokenizer = processor.tokenizer
    correct, tokens = 0, 0
    for start in tqdm(range(0, len(samples), batch_size), desc="answering"):
        batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        ids, mask, fields = encode_prompts(processor, batch)
        inputs = {"input_ids": ids, "attention_mask": mask, **fields}
        output = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            do_sample=False,
            max_new_tokens=max_new_tokens,
            suppress_tokens=placeholder_ids(model.config),
            pad_token_id=tokenizer.pad_token_id,
        )[:, ids.shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        correct += sum(scorer(text, x["answer"]) for text, x in zip(texts, batch, strict=True))
        tokens += int((output != tokenizer.pad_token_id).sum())
    model.train(was_training)
    return {"accuracy": correct / len(samples), "samples": len(samples), "mean_length": tokens / len(samples)}
