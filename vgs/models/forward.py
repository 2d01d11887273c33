"""Run a model once over both views and score the response tokens: hidden states in, per-token VGS terms out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vgs_kernels import (
    DivergenceOutput,
    VGSObjective,
    VGSOutput,
    fused_linear_divergence,
    fused_linear_vgs_loss,
)

from ..log import warn_once
from .attention import use_packed_attention
from .families import backbone, is_verified
from .groups import PromptGroup, response_lengths
from .heads import Head
from .linear_attention import carried_states
from .packing import PackedRow, Stem, image_stem, pack, text_stem
from .padding import PaddedViews, pad_groups
from .positions import prompt_positions

logger = logging.getLogger(__name__)


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


def packed_states(model: nn.Module, row: PackedRow) -> Tensor:
    """[N, D] post-norm hidden states that predict the response tokens of a packed row."""
    use_packed_attention(backbone(model))
    with row.layout.active():
        # The mask of ones keeps the library from guessing sequences out of positions.
        mask = torch.ones_like(row.input_ids)
        states = final_states(
            model,
            input_ids=row.input_ids,
            attention_mask=mask,
            position_ids=row.position_ids,
            **row.images,
            **carried_states(model, row),
        )
    return states[0].index_select(0, row.scored.to(states.device))


def padded_states(model: nn.Module, views: PaddedViews) -> Tensor:
    """[N, D] (or [2N, D], text-only view last): as ``packed_states``, of padded rows."""
    inputs = {"input_ids": views.input_ids, "attention_mask": views.attention_mask, **views.images}
    # Padding on the left must not count: some stacks scale queries by the place in the sequence (Ministral 3).
    if not hasattr(backbone(model), "get_rope_index"):
        inputs["position_ids"] = (views.attention_mask.cumsum(dim=-1) - 1).clamp(min=0)
    states = final_states(model, **inputs)
    columns = views.response_mask.shape[1]
    return states[:, -columns - 1 : -1][views.row_mask.to(states.device)]


def score_groups(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    *,
    text: bool = True,
    text_gradient: bool | Sequence[bool] = True,
    share_prefix: bool = True,
    kernel: str = "auto",
) -> tuple[Tensor, ...]:
    """Hidden states at response positions, of both views, aligned token by token.

    All prompts and responses run in one packed row, without padding, each prompt and its images once. Families whose
    positions are not verified there (``vgs.models.families``) run as padded batches.

    Args:
        model: an unwrapped vision-language model, or a PEFT model around one. To train one inside DDP, FSDP or
            DeepSpeed, call this inside ``vgs.models.wrappers.run_inside``.
        groups: prompts with their responses.
        text: whether to score the text-only view too.
        text_gradient: whether the text-only rows may carry gradient, for all responses or for each in the order of the
            groups. Those that may not run under no_grad.
        share_prefix: with False every response gets a copy of its prompt.
        kernel: attention in packed rows, see ``vgs.models.attention.RowLayout``.

    Returns:
        ([N, D] multimodal,) or ([N, D] multimodal, [N, D] text-only); order: group, response, token.

    Raises:
        TypeError: the model is wrapped.
        ValueError: ``text_gradient`` does not have one entry per response.
    """
    if "module" in model._modules:
        raise TypeError(
            f"model must be unwrapped, got a {type(model).__name__}: score it inside run_inside(wrapped, task), where "
            "the wrapper knows of it."
        )
    lengths = response_lengths(groups)
    wanted = [text_gradient] * len(lengths) if isinstance(text_gradient, bool) else list(text_gradient)
    if len(wanted) != len(lengths):
        raise ValueError(f"text_gradient must have one entry for each of {len(lengths)} responses, got {len(wanted)}.")
    device = model.get_input_embeddings().weight.device
    if not torch.is_grad_enabled():
        wanted = [True] * len(wanted)  # one pass serves both views
    if not is_verified(model):
        return _score_padded(model, groups, text, wanted, device)
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


def score_with_anchor(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    anchor: PromptGroup | None,
    *,
    text: bool = True,
    text_gradient: bool | Sequence[bool] = True,
    share_prefix: bool = True,
    kernel: str = "auto",
) -> tuple[list[Tensor], Tensor | None]:
    """As ``score_groups``, but prompts without any image are joined by one with an image.

    Ranks that train one model together must all run the same layers, in the forward and in the backward: one that has
    no image, or nothing at all, in its batch would leave the others waiting at the vision tower.

    Args:
        model, text, text_gradient, share_prefix, kernel: as in ``score_groups``.
        groups: prompts with their responses; may be empty where there is an anchor.
        anchor: a prompt with an image and one response, such as ``vgs.data.prompts.anchor_group`` makes; None joins
            nothing.

    Returns:
        Hidden states of ``groups`` alone, [N, D] each, and a zero that carries gradient to all that the anchor ran
        through, to be added to the loss; None where no anchor was needed.

    Raises:
        ValueError, TypeError: as ``score_groups``.
    """
    count = sum(response_lengths(groups))
    joined = anchor is not None and not any(group.has_images for group in groups)
    if joined:
        groups = [*groups, anchor]
        if not isinstance(text_gradient, bool):
            text_gradient = [*text_gradient, False]
    rows = score_groups(model, groups, text=text, text_gradient=text_gradient, share_prefix=share_prefix, kernel=kernel)
    zero = 0.0 * sum(x[count:].float().sum() for x in rows) if joined else None
    return [x[:count] for x in rows], zero


def _original_order(lengths: Sequence[int], first: Sequence[bool]) -> Tensor:
    """[N] places, in rows sorted by ``not first``, of the tokens of responses with these lengths."""
    marks = torch.tensor(first).repeat_interleave(torch.tensor(lengths))
    return torch.argsort(torch.argsort(~marks, stable=True))


def _score_padded(
    model: nn.Module, groups: Sequence[PromptGroup], text: bool, wanted: Sequence[bool], device: torch.device
) -> tuple[Tensor, ...]:
    """As ``score_groups``; text-only rows all carry gradient if one does."""
    warn_once(
        logger,
        f"{type(model).__name__} ({model.config.model_type}) is not verified in packed rows; its views are padded "
        "batches instead, which takes longer.",
    )
    # Without image grids, a family may batch its pixels by row, where text-only rows do not fit in.
    stackable = all("image_grid_thw" in group.images or not group.has_images for group in groups)
    if text and stackable and all(wanted):
        return padded_states(model, pad_groups(groups, ("multimodal", "text"), device)).chunk(2)
    rows = padded_states(model, pad_groups(groups, ("multimodal",), device))
    if not text:
        return (rows,)
    with torch.set_grad_enabled(any(wanted) and torch.is_grad_enabled()):
        return rows, padded_states(model, pad_groups(groups, ("text",), device))


def fused_loss(
    student_rows: Sequence[Tensor],
    teacher_rows: Sequence[Tensor],
    student_head: Head,
    teacher_head: Head,
    objective: VGSObjective,
    *,
    token_weights: Tensor | None = None,
    trajectory_ids: Tensor | None = None,
    return_terms: bool = True,
    **options: Any,
) -> VGSOutput | DivergenceOutput:
    """The loss of scored response tokens.

    Args:
        student_rows, teacher_rows: (multimodal, text-only) hidden states, [N, Ds] and [N, Dt] each. Where neither loss
            nor log needs the text-only view (gamma = lam = 0), the multimodal one alone.
        student_head, teacher_head: from ``read_head``.
        objective: gamma, lam, eta and the rest.
        token_weights: [N] float32; None means 1/N each.
        trajectory_ids: [N] int64, see ``groups.trajectory_ids``.
        return_terms: whether the per-token terms are wanted.
        **options: vocab_size, workspace_bytes, backend, target_ids, policy (which eta does not scale), and of the
            steered loss vds and vds_threshold; see ``fused_linear_vgs_loss``.

    Raises:
        ValueError: the two heads are on different devices.
    """
    device = student_head.weight.device
    if device != teacher_head.weight.device:
        raise ValueError(
            f"The student's output head is on {device} and the teacher's on {teacher_head.weight.device}; "
            "place both on one device."
        )
    # With a model split over devices, the backbone can end elsewhere than the head.
    student_rows, teacher_rows = [rows.to(device) for rows in student_rows], [rows.to(device) for rows in teacher_rows]
    token_weights = None if token_weights is None else token_weights.to(device)
    if len(student_rows) == 1:
        count = len(student_rows[0])
        weights = torch.full((count,), 1.0 / max(count, 1), device=device) if token_weights is None else token_weights
        return fused_linear_divergence(
            student_rows[0],
            student_head.weight,
            [teacher_head.target(teacher_rows[0])],
            token_weights=objective.eta * weights,
            temperature=objective.temperature,
            **student_head.student_options,
            **options,
        )
    return fused_linear_vgs_loss(
        *student_rows,
        student_head.weight,
        *teacher_rows,
        teacher_head.weight,
        objective=objective,
        token_weights=token_weights,
        trajectory_ids=None if trajectory_ids is None else trajectory_ids.to(device),
        return_terms=return_terms,
        teacher_bias=teacher_head.bias,
        teacher_softcap=teacher_head.softcap,
        teacher_logit_scale=teacher_head.logit_scale,
        **student_head.student_options,
        **options,
    )
