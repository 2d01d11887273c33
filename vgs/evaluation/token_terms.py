"""Per-token terms of given responses, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgs_kernels import VGSObjective, fused_linear_divergence

from ..data.prompts import encode_groups
from ..models.families import placeholder_ids
from ..models.forward import fused_loss, score_groups
from ..models.groups import response_ids, response_lengths, trajectory_ids
from ..models.heads import output_layer, read_head, whole_heads
from ..models.wrappers import run_inside, unwrap


@torch.no_grad()
def score_responses(
    student: nn.Module,
    teacher: nn.Module,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    objective: VGSObjective,
) -> list[dict[str, Tensor]]:
    """Per-token VGS terms of given responses, without a trainer.

    Args:
        student, teacher: vision-language models on one device, sharing ``processor``; left in the mode they are in.
        processor: renders the prompts and prepares the images.
        samples: dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images).
        completion_ids: the response tokens of each sample.
        objective: as in training; its ``vds_scope`` "call" covers all the samples given here.

    Returns:
        One dict per sample: ``token_ids`` [T] int64 and ``standard``, ``visual``, ``language``, ``vds``, ``entropy``,
        ``student_vds`` (KL(p_I || p_x)) [T] float, in nats, on the CPU.

    Raises:
        ValueError, TypeError: naming the argument: different numbers of samples and responses, an image placeholder in
            a text-only view, heads of different devices or vocabularies, or one that cannot be read.
    """
    device = output_layer(student).weight.device
    responses = [[ids] for ids in completion_ids]
    groups = encode_groups(processor, samples, responses, placeholder_ids(student.config), device)
    student_rows, teacher_rows = score_groups(student, groups), score_groups(teacher, groups)
    heads = read_head(student, student_rows[0].dtype), read_head(teacher, teacher_rows[0].dtype)
    output = fused_loss(student_rows, teacher_rows, *heads, objective, trajectory_ids=trajectory_ids(groups))
    lengths = response_lengths(groups)
    columns = {"token_ids": torch.cat([x for group in groups for x in group.responses]).split(lengths)}
    for name in ("standard", "visual", "language", "vds", "entropy", "student_vds"):
        columns[name] = getattr(output, name).float().cpu().split(lengths)
    return [{name: parts[index] for name, parts in columns.items()} for index in range(len(samples))]


@torch.no_grad()
def describe_responses(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    responses: Sequence[Sequence[Sequence[int]]],
    *,
    temperature: float = 1.0,
    **template_options: Any,
) -> list[list[dict[str, Tensor]]]:
    """What one model thinks of every token of given responses; no teacher is needed.

    Args:
        model: a vision-language model as a loop holds it, see ``vgs.vgs_step``; left in the mode it is in. Where it is
            sharded (FSDP2, ZeRO-3), all ranks call, with an image among their samples.
        processor: renders the prompts and prepares the images.
        samples: B dicts with ``prompt`` (chat messages) and ``images`` (list of PIL images).
        responses: for every sample its responses, each a list of token ids, such as ``vgs.respond`` gives.
        temperature: divides the logits.
        **template_options: for the chat template.

    Returns:
        For each sample and response of T tokens a dict with ``token_ids`` [T] int64, and [T] float32 on the CPU:
        ``logps`` (log-probability of the token), ``entropy`` and ``vds`` (visual dependency: KL of the model with the
        image from itself without, arXiv 2606.00564, Eq. 12), in nats.

    Raises:
        ConfigError, ValueError, TypeError: as ``vgs.vgs_step``.
    """
    inner = unwrap(model)
    groups = encode_groups(processor, samples, responses, placeholder_ids(inner.config), **template_options)
    ids = response_ids(groups)

    def score() -> tuple[None, list[Tensor]]:
        image, text = score_groups(inner, groups)
        with whole_heads(inner):
            head = read_head(inner, image.dtype)
            image, text = (x.to(head.weight.device) for x in (image, text))
            output = fused_linear_divergence(
                image,
                head.weight,
                [head.target(text)],
                target_ids=ids.to(image.device),
                temperature=temperature,
                **head.student_options,
            )
        return None, [output.target_logps, output.entropy, output.divergence]

    _, found = run_inside(model, score)
    columns = {
        "token_ids": ids,
        **dict(zip(("logps", "entropy", "vds"), (x.float().cpu() for x in found), strict=True)),
    }
    parts = {name: iter(column.split(response_lengths(groups))) for name, column in columns.items()}
    return [[{name: next(part) for name, part in parts.items()} for _ in group.responses] for group in groups]
