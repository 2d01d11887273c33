"""eta, the scale of the whole loss: the paper's constants, and the gradient norms that measure it.

eta = ||grad standard|| / ||grad (standard + gamma * visual)|| (arXiv 2606.00564, Eq. 15): gamma then turns the gradient
and does not lengthen it. A *ratio* below is that quotient at the gamma of the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vgs_kernels import fused_linear_divergence

from ..models.heads import Head

ETA_PRESETS = {"paper-2b": 0.41, "paper-4b": 0.36}  # arXiv 2606.00564: its constants for the two student sizes
#: Ways to measure it: at the start; in every step; in some steps, smoothed; from the last hidden states, smoothed.
ETA_MODES = ("measure", "exact", "tracked", "cheap")


def eta_at(ratio: float, share: float) -> float:
    """eta where gamma is a share of the gamma that a ratio was measured at.

    ||g + gamma * h|| / ||g|| is taken to grow in a line with gamma: exact for shares 0 and 1, and at gamma 2 within
    4 % between them where both gradients are as long and their cosine is 0.7 (arXiv 2606.00564, App. A).

    Args:
        ratio: ||g|| / ||g + gamma * h||, measured. share: in [0, 1].
    """
    return ratio / (ratio + share * (1.0 - ratio))


def ratio_from(eta: float, share: float) -> float:
    """The ratio that ``eta_at`` says ``eta`` for; at most 10, should the gradients of a small share lead beyond.

    Args:
        eta: measured with this share of gamma. share: in (0, 1].
    """
    return 1.0 / max(1.0 + (1.0 / eta - 1.0) / share, 0.1)


def gradient_norm(
    losses: Iterable[Tensor], parameters: Sequence[Tensor], reduce: Callable[[Tensor], Tensor] = lambda x: x
) -> float:
    """Norm over all parameters of the gradient of a sum of losses, leaving ``.grad`` alone.

    Args:
        losses: 0-d tensors with their graphs, one at a time (each graph is freed before the next is built).
        parameters: the tensors to differentiate by.
        reduce: averages a gradient over data-parallel ranks.
    """
    total: list[Tensor] | None = None
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        total = list(gradients) if total is None else torch._foreach_add(total, gradients)
    assert total is not None, "at least one loss is needed"
    return math.sqrt(sum(reduce(gradient).double().square().sum().item() for gradient in total))


def sharded_gradient_norm(losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> float:
    """As ``gradient_norm`` where FSDP2 averages gradients over ranks in the backward and leaves each rank its shard.

    Args:
        losses: 0-d tensors with the graphs through the sharded model's forward; as many on every rank.
        parameters: of the model; their ``.grad`` is as before afterwards.
    """
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        for loss in losses:
            loss.backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        total = 0.0
        for sharded in (True, False):
            if part := [x for x in gradients if isinstance(x, DTensor) == sharded]:
                norm = torch.nn.utils.get_total_norm(part)
                total += (norm.full_tensor() if isinstance(norm, DTensor) else norm).double().square().item()
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    return math.sqrt(total)


def hidden_norms(
    loss: Tensor, rows: Tensor, head: Head, teacher_rows: Tensor, teacher_head: Head, weights: Tensor, **options: Any
) -> Tensor:
    """[2] float64 squared norms of the gradients at the last hidden states: of standard alone, and of the loss.

    The loss has formed its own already. The other costs three products with the heads, and none with the backbone.

    Args:
        loss: 0-d, of standard and visual, which ``rows`` lead to.
        rows, head: [N, Ds] of the student with the image, and its head.
        teacher_rows, teacher_head: [N, Dt] likewise.
        weights: [N] of the tokens in the loss, eta included.
        **options: of ``fused_linear_divergence``.
    """
    if not rows.requires_grad:
        return torch.zeros(2, dtype=torch.float64, device=rows.device)
    (steered,) = torch.autograd.grad(loss, rows, retain_graph=True)
    own, bias = rows.detach().requires_grad_(), None if head.bias is None else head.bias.detach()
    head = replace(head, weight=head.weight.detach(), bias=bias)
    targets = [teacher_head.target(teacher_rows)]
    output = fused_linear_divergence(
        own, head.weight, targets, token_weights=weights, **head.student_options, **options
    )
    (standard,) = torch.autograd.grad(output.loss, own)
    return torch.stack([gradient.double().square().sum() for gradient in (standard, steered)])
