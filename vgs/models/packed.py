"""Both views of many prompts in one packed row, without padding: each prompt and its images run once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .attention import use_packed_attention, whole_rows
from .families import backbone
from .groups import PromptGroup, response_lengths
from .kernel_limits import usable_kernel
from .linear_attention import carried_states
from .packing import PackedRow, Stem, image_stem, pack, text_stem
from .positions import prompt_positions
from .states import final_states

#: Text stacks that take a token's positions alone, without its place in the sequence in front of them.
WITHOUT_PLACES = ("hunyuan_vl_text",)


def packed_states(model: nn.Module, row: PackedRow) -> Tensor:
    """[N, D] post-norm hidden states that predict the response tokens of a packed row."""
    body = backbone(model)
    use_packed_attention(body)
    positions = row.position_ids
    if positions.ndim == 3 and body.config.get_text_config().model_type in WITHOUT_PLACES:
        positions = positions[1:]
    # The mask of ones keeps the library from guessing sequences out of positions.
    inputs = {"input_ids": row.input_ids, "attention_mask": torch.ones_like(row.input_ids), **row.images}
    with row.layout.active():
        states = final_states(model, position_ids=positions, **inputs, **whole_rows(body), **carried_states(model, row))
    return states[0].index_select(0, row.scored.to(states.device))


def score_packed(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    text: bool,
    wanted: Sequence[bool],
    device: torch.device,
    *,
    share_prefix: bool = True,
    kernel: str = "auto",
) -> tuple[Tensor, ...]:
    """As ``vgs.models.forward.score_groups``, of a model whose packed rows are exact.

    Args:
        model, groups, text, share_prefix, kernel: see there.
        wanted: for each response whether its text-only rows carry gradient.
        device: where the row's tensors go.
    """
    lengths, kernel = response_lengths(groups), usable_kernel(model, kernel, device)
    stems = [image_stem(group, prompt_positions(model, group.prompt_ids, group.images)) for group in groups]
    axes = len(stems[0].positions)
    flags = iter(wanted)
    with_gradient, without = [], []
    for group in groups if text else ():
        marks = [next(flags) for _ in group.responses]
        for part, mark in ((with_gradient, True), (without, False)):
            if chosen := [index for index, flag in enumerate(marks) if flag == mark]:
                part.append(text_stem(group.select(chosen), axes))

    def run(parts: Sequence[Stem]) -> Tensor:
        return packed_states(model, pack(parts, device, share_prefix=share_prefix, kernel=kernel))

    states = run([*stems, *with_gradient])
    if not text:
        return (states,)
    rows, text_rows = states[: sum(lengths)], states[sum(lengths) :]
    if without:
        with torch.no_grad():
            others = run(without)
        if not with_gradient:
            return rows, others
        text_rows = torch.cat([text_rows, others])[_original_order(lengths, wanted).to(others.device)]
    return rows, text_rows


def _original_order(lengths: Sequence[int], first: Sequence[bool]) -> Tensor:
    """[N] places, in rows sorted by ``not first``, of the tokens of responses with these lengths."""
    marks = torch.tensor(first).repeat_interleave(torch.tensor(lengths))
    return torch.argsort(torch.argsort(~marks, stable=True))
