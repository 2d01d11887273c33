"""The states that enter a model's output head, and the fallback that has them from padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .families import backbone
from .groups import PromptGroup
from .padding import PaddedViews, pad_groups


def final_states(model: nn.Module, **inputs: Any) -> Tensor:
    """[B, L, D] hidden states that enter the output head, of an unwrapped (possibly PEFT) model.

    A body that holds the head itself (Llama 4's wrapper) does not return them: they are taken where they enter it.

    Args:
        model: with output embeddings.
        **inputs: of the body's forward.
    """
    body, head = backbone(model), model.get_output_embeddings()
    if all(module is not head for module in body.modules()):
        return body(**inputs, use_cache=False).last_hidden_state
    entered: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    try:
        body(**inputs, use_cache=False)
    finally:
        handle.remove()
    return entered[-1]


def padded_states(model: nn.Module, views: PaddedViews) -> Tensor:
    """[N, D] (or [2N, D], text-only view last): as ``packed_states``, of padded rows."""
    inputs = {"input_ids": views.input_ids, "attention_mask": views.attention_mask, **views.images}
    # Padding on the left must not count: some stacks scale queries by the place in the sequence (Ministral 3).
    if not hasattr(backbone(model), "get_rope_index"):
        inputs["position_ids"] = (views.attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    states = final_states(model, **inputs)
    columns = views.response_mask.shape[1]
    return states[:, -columns - 1 : -1][views.row_mask.to(states.device)]


def score_padded(
    model: nn.Module, groups: Sequence[PromptGroup], text: bool, wanted: Sequence[bool], device: torch.device
) -> tuple[Tensor, ...]:
    """As ``score_groups``; text-only rows all carry gradient if one does."""
    # Without image grids, a family may batch its pixels by row, where text-only rows do not fit in.
    stackable = all("image_grid_thw" in group.images or not group.has_images for group in groups)
    if text and stackable and all(wanted):
        return padded_states(model, pad_groups(groups, ("multimodal", "text"), device)).chunk(2)
    rows = padded_states(model, pad_groups(groups, ("multimodal",), device))
    if not text:
        return (rows,)
    with torch.set_grad_enabled(any(wanted) and torch.is_grad_enabled()):
        return rows, padded_states(model, pad_groups(groups, ("text",), device))
