"""Run a model once over both views and score the response tokens: hidden states in, per-token VGS terms out."""

from __future__ import annotations

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

from .families import device_of
from .groups import PromptGroup, response_lengths
from .heads import Head
from .packed import score_packed
from .positions import check_rotary_lengths
from .self_check import chosen_way
from .states import score_padded


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

    All prompts and responses run in one packed row, without padding, each prompt and its images once. A family whose
    packed rows are not exact runs as padded batches; the first call for a family finds out (``self_check``).

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
        ConfigError: the family is exact in neither form, or its rotary frequencies depend on the whole batch.
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
    device = device_of(model)
    if not torch.is_grad_enabled():
        wanted = [True] * len(wanted)  # one pass serves both views
    check_rotary_lengths(model, groups, text)
    way = chosen_way(model, groups)
    if way == "packed":
        return score_packed(model, groups, text, wanted, device, share_prefix=share_prefix, kernel=kernel)
    return score_padded(model, groups, text, wanted, device, share_images=way == "padded")


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
        **options: vocab_size, workspace_bytes, gradient_tolerance, backend, target_ids, policy (which eta does not
            scale), and of the steered loss vds and vds_threshold; see ``fused_linear_vgs_loss``.

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
