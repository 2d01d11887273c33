"""Per-token terms of given responses, without a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgs_kernels import VGSObjective

from ..data.prompts import encode_groups
from ..models.families import placeholder_ids
from ..models.forward import fused_loss, score_groups
from ..models.groups import response_lengths, trajectory_ids
from ..models.heads import output_layer, read_head


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
