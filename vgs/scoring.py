"""Run a model once over both views and score the response tokens: hidden states in, per-token VGS terms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn

from vgs_kernels import (
    DivergenceOutput,
    TargetRow,
    VGSObjective,
    VGSOutput,
    fused_linear_divergence,
    fused_linear_vgs_loss,
)

from .pairing import PairedViews, encode_views, placeholder_ids


@dataclass(frozen=True)
class Head:
    """A model's output projection: logits = softcap * tanh(logit_scale * (h W^T + bias) / softcap).

    Attributes:
        weight: [V, D]. bias: [V] or None. logit_scale: a factor on the logits. softcap: None for no soft-cap.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None


def logit_scale(config: Any) -> float:
    """The factor that a model family puts on its logits, under whichever name its text config has it."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    divisor = getattr(config, "logits_scaling", None)
    if divisor is None:
        return 1.0
    # The same field divides in Granite and MiniCPM3, and multiplies in HyperCLOVA X.
    return float(divisor) if config.model_type == "hyperclovax" else 1.0 / float(divisor)


def read_head(model: nn.Module, dtype: torch.dtype) -> Head:
    """The output head of an unwrapped (possibly PEFT) model.

    An FSDP2 head is a DTensor: it is gathered once, here, and cast from its float32 master copy to ``dtype``. A ZeRO-3
    head must be gathered around this call and the loss (``trl.trainer.utils.maybe_gather_lm_head_ctx``).
    """
    layer = model.get_output_embeddings()
    weight, bias = layer.weight, getattr(layer, "bias", None)
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor().to(dtype)
        bias = None if bias is None else bias.full_tensor()
    config = model.config.get_text_config()
    return Head(weight, bias, logit_scale(config), getattr(config, "final_logit_softcapping", None))


def hidden_rows(model: nn.Module, views: PairedViews) -> Tensor:
    """Post-norm hidden states that predict the response tokens, compacted.

    Args:
        model: an unwrapped vision-language model, or a PEFT model around one.
        views: B or 2B rows (both views); every row's response is in the last C columns.

    Returns:
        [N, D] for one view; [2N, D] for both, the multimodal view first.
    """
    if is_peft_model(model):
        model = model.base_model.model
    # `base_model` is the multimodal backbone without the head; `get_decoder()` would be the text stack alone.
    states = model.base_model(
        input_ids=views.input_ids, attention_mask=views.attention_mask, use_cache=False, **views.multimodal
    ).last_hidden_state
    columns = views.response_mask.shape[1]
    mask = views.response_mask.repeat(len(states) // len(views.response_mask), 1)
    return states[:, -columns - 1 : -1][mask.to(states.device)]


def multimodal_rows(model: nn.Module, views: PairedViews) -> tuple[Tensor]:
    """As ``score_views``, of the multimodal view alone: ([N, D],)."""
    return (hidden_rows(model, views.multimodal_view()),)


def score_views(model: nn.Module, views: PairedViews, text_gradient: bool = True) -> tuple[Tensor, Tensor]:
    """Hidden states of both views, aligned token by token.

    Args:
        model: as in ``hidden_rows``.
        views: both views, from ``pair_views``.
        text_gradient: whether the text-only rows may carry gradient. False, where gradients are on, runs them in a
            second forward under no_grad; otherwise one forward serves both views.

    Returns:
        ([N, D] multimodal, [N, D] text-only).
    """
    # Without image grids, a family may batch its pixels by row, where text-only rows do not fit in.
    stackable = "image_grid_thw" in views.multimodal or "pixel_values" not in views.multimodal
    if stackable and (text_gradient or not torch.is_grad_enabled()):
        rows, text_rows = hidden_rows(model, views).chunk(2)
        return rows, text_rows
    rows = hidden_rows(model, views.multimodal_view())
    with torch.set_grad_enabled(text_gradient and torch.is_grad_enabled()):
        return rows, hidden_rows(model, views.text_view())


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
        trajectory_ids: [N] int64, from ``PairedViews``.
        return_terms: whether the per-token terms are wanted.
        **options: vocab_size, workspace_bytes, backend of ``fused_linear_vgs_loss``.

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
    student_options = {
        "student_bias": student_head.bias,
        "student_softcap": student_head.softcap,
        "student_logit_scale": student_head.logit_scale,
    }
    if len(student_rows) == 1:
        target = TargetRow(
            1.0,
            teacher_rows[0],
            teacher_head.weight,
            teacher_head.bias,
            logit_scale=teacher_head.logit_scale,
            softcap=teacher_head.softcap,
        )
        output = fused_linear_divergence(
            student_rows[0],
            student_head.weight,
            [target],
            token_weights=token_weights,
            temperature=objective.temperature,
            **student_options,
            **options,
        )
        return replace(output, loss=objective.eta * output.loss)
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
        **student_options,
        **options,
    )


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
    """
    device = student.get_output_embeddings().weight.device
    views = encode_views(processor, samples, completion_ids, placeholder_ids(student.config), device)
    student_rows, teacher_rows = score_views(student, views), score_views(teacher, views)
    heads = read_head(student, student_rows[0].dtype), read_head(teacher, teacher_rows[0].dtype)
    output = fused_loss(student_rows, teacher_rows, *heads, objective, trajectory_ids=views.trajectory_ids)
    lengths = [len(ids) for ids in completion_ids]
    columns = {"token_ids": views.response_ids.cpu().split(lengths)}
    for name in ("standard", "visual", "language", "vds", "entropy", "student_vds"):
        columns[name] = getattr(output, name).float().cpu().split(lengths)
    return [{name: parts[index] for name, parts in columns.items()} for index in range(len(samples))]
