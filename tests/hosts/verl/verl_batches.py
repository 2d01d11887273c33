"""A mini-batch as verl's trainer hands it to an actor: four prompts with two responses each, some of a tool's words.

Imports no verl: the tests use it for the plain models, and their workers for verl's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import save_tiny_checkpoint, tiny_samples
from torch import Tensor
from transformers import AutoProcessor, PreTrainedModel

from vgs.data.prompts import encode_groups
from vgs.models.families import placeholder_ids
from vgs.models.groups import PromptGroup
from vgs_kernels import VGSObjective

KNOBS = {"gamma": 1.5, "lam": 0.5, "eta": 0.7, "temperature": 1.2}
OBJECTIVE = VGSObjective(**KNOBS)
RESPONSES = [[[20, 1], [20, 9, 8]], [[21, 22, 23, 1], [8]], [[24, 9], [9]], [[25, 26, 1], [22, 22, 23, 10, 1]]]
#: Tokens of a row that the student did not sample.
TOOL = {2: [1, 2], 7: [0]}
ROWS = 8


def save_models(folder: Path) -> None:
    """Student and teacher, each with the real processor of its family."""
    save_tiny_checkpoint(folder / "student", seed=0)
    save_tiny_checkpoint(folder / "teacher", seed=1, hidden=48)


def rows_of(folder: Path, model: PreTrainedModel) -> tuple[list[PromptGroup], list[Tensor]]:
    """The rows, one response each, and their masks."""
    processor = AutoProcessor.from_pretrained(folder / "student")
    samples = tiny_samples(4)
    samples[1]["images"] = []  # a row with words alone
    groups = encode_groups(processor, samples, RESPONSES, placeholder_ids(model.config))
    rows = [single for group in groups for single in group.alone()]
    masks = [torch.ones(len(row.responses[0]), dtype=torch.int64) for row in rows]
    for number, places in TOOL.items():
        masks[number][places] = 0
    return rows, masks


def columns(rows: list[PromptGroup], masks: list[Tensor], chosen: list[int]) -> dict[str, Any]:
    """Some of the rows under verl's names; verl hands no ``mm_token_type_ids`` on."""
    part = [rows[number] for number in chosen]
    ids = [torch.cat([row.prompt_ids, row.responses[0]]) for row in part]
    advantages = [torch.linspace(-1, 1, 8)[number].expand(len(rows[number].responses[0])) for number in chosen]
    return {
        "prompts": [row.prompt_ids for row in part],
        "responses": [row.responses[0] for row in part],
        "input_ids": ids,
        "position_ids": [torch.arange(len(x)).expand(4, -1).contiguous() for x in ids],
        "response_mask": [masks[number] for number in chosen],
        "loss_mask": [masks[number] for number in chosen],
        "advantages": [x.contiguous() for x in advantages],
        "old_log_probs": [torch.full((len(row.responses[0]),), -2.0) for row in part],
        "multi_modal_inputs": [{k: v for k, v in row.images.items() if k != "mm_token_type_ids"} for row in part],
        "extra_fields": [{"text_prompt_ids": row.text_prompt_ids.tolist()} for row in part],
        "uid": [f"prompt {number // 2}" for number in chosen],
    }


def plain_logits(model: PreTrainedModel, row: PromptGroup, with_image: bool) -> Tensor:
    """[T, V] logits of a row's response in one view, by a forward of the model for this row alone."""
    prompt = row.prompt_ids if with_image else row.text_prompt_ids
    response = row.responses[0]
    inputs = {"input_ids": torch.cat([prompt, response])[None], **(row.images if with_image else {})}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([kinds, torch.zeros_like(response)])[None]
    return model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).logits[0, -len(response) - 1 : -1]


def plain_loss(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: list[PromptGroup], masks: list[Tensor], reduction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """The paper's formula over plain forwards, and the mean of each term over the student's own tokens."""
    terms: dict[str, list[Tensor]] = {"standard": [], "visual": [], "language": [], "vds": []}
    weights = []
    tokens, answers = sum(int(mask.sum()) for mask in masks), sum(bool(mask.any()) for mask in masks)
    for row, mask in zip(rows, masks, strict=True):
        four = [plain_logits(model, row, view) for model in (student, teacher) for view in (True, False)]
        p, prior, q, blind = ((x[mask.bool()] / OBJECTIVE.temperature).log_softmax(-1) for x in four)
        q, blind = q.detach(), blind.detach()
        target = (prior.detach() + q - blind).log_softmax(-1)
        pairs = {"standard": (p, q), "visual": (p, target), "language": (prior, blind), "vds": (q, blind)}
        for name, (one, other) in pairs.items():
            terms[name].append((one.exp() * (one - other)).sum(-1))
        own = int(mask.sum())
        weights += [1 / tokens if reduction == "token" else 1 / (answers * max(own, 1))] * own
    found = {name: torch.cat(parts) for name, parts in terms.items()}
    gate = found["vds"] > found["vds"].quantile(OBJECTIVE.vds_quantile)
    loss = found["standard"] + OBJECTIVE.gamma * found["visual"] + OBJECTIVE.lam * gate * found["language"]
    means = {name: x.detach().mean() for name, x in found.items()} | {"gate": gate.float().mean()}
    return OBJECTIVE.eta * (torch.tensor(weights) * loss).sum(), means
