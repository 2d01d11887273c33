"""What privileged context changes in a model's distribution: nats per token between it and the plain context.

The diagnostic of Visual-OPSD (arXiv 2606.18974): large before self-distillation, smaller after it where the student has
learned what the context says, and hardly smaller after training with noise for context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgs_kernels import fused_linear_divergence

from ..data.privileged import privileged_groups
from ..data.prompts import encode_groups
from ..models.families import placeholder_ids
from ..models.forward import score_groups
from ..models.heads import output_layer, read_head
from .sampling import Sampling, sample_responses

DIVERGENCES = {"gap": {"divergence": "forward_kl"}, "reverse": {"divergence": "reverse_kl"}}


@torch.no_grad()
def kl_gap(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    responses: Sequence[Sequence[int]],
    *,
    teacher: nn.Module | None = None,
    mode: str = "add",
    control: str | None = None,
    temperature: float = 1.0,
    batch_size: int = 8,
    vocab_size: int | None = None,
    **template_options: Any,
) -> dict[str, float]:
    """Divergences per token between a model with privileged and with plain context.

    Args:
        model: a vision-language model; scores in eval mode and is left in the mode it came in.
        processor: its processor.
        samples: with ``prompt``, ``images`` and privileged columns, see ``vgs.data.privileged``.
        responses: token ids of a response to each sample; of the model itself, for the gap on its own policy.
        teacher: what sees the privileged context; None: the model itself.
        mode, control: see ``privileged.privileged_sample``.
        temperature: divides the logits.
        batch_size: samples that are scored together.
        vocab_size: leading vocabulary columns to use; None: all.
        **template_options: passed to ``apply_chat_template``.

    Returns:
        Means over all tokens, in nats: ``gap`` KL(privileged || plain) and ``reverse`` KL(plain || privileged);
        ``tokens``, how many.

    Raises:
        ValueError: different numbers of samples and responses, or no token at all.
    """
    if len(samples) != len(responses):
        raise ValueError(f"responses must have one entry for each of {len(samples)} samples, got {len(responses)}.")
    if not any(map(len, responses)):
        raise ValueError("responses must have tokens, got none.")
    teacher = model if teacher is None else teacher
    modes = [(each, each.training) for each in (model, teacher)]
    device = output_layer(model).weight.device
    forbidden = placeholder_ids(model.config)
    sums: dict[str, float] = dict.fromkeys(DIVERGENCES, 0.0)
    for each, _ in modes:
        each.eval()
    for first in range(0, len(samples), batch_size):
        batch = [samples[i] for i in range(first, min(first + batch_size, len(samples)))]
        answers = [[list(ids)] for ids in responses[first : first + batch_size]]
        plain = encode_groups(processor, batch, answers, forbidden, device, **template_options)
        seen = privileged_groups(
            processor, batch, plain, forbidden, device, mode=mode, control=control, **template_options
        )
        rows, target = _states(model, plain), _states(teacher, seen)
        head, teacher_head = read_head(model, rows.dtype), read_head(teacher, target.dtype)
        for name, knobs in DIVERGENCES.items():
            output = fused_linear_divergence(
                rows,
                head.weight,
                [teacher_head.target(target.to(rows.device))],
                **knobs,
                temperature=temperature,
                vocab_size=vocab_size,
                **head.student_options,
            )
            sums[name] += output.divergence.double().sum().item()
    for each, training in modes:
        each.train(training)
    tokens = sum(map(len, responses))
    return {**{name: total / tokens for name, total in sums.items()}, "tokens": tokens}


def _states(model: nn.Module, groups: Sequence[Any]) -> Tensor:
    (states,) = score_groups(model, groups, text=False)
    return states


def on_policy(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    *,
    seed: int = 0,
    **options: Any,
) -> list[list[int]]:
    """A sampled response to each sample in its plain context.

    Args:
        model, processor, samples, sampling, options: see ``sampling.sample_responses``.
        seed: of the sampling; torch's own state is left as it was.

    Returns:
        Token ids of each response.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return sample_responses(model, processor, samples, sampling, **options)
