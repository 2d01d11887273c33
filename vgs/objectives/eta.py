"""eta, the scale of the whole loss: the paper's constants, and the gradient norms that measure it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

ETA_PRESETS = {"paper-2b": 0.41, "paper-4b": 0.36}  # arXiv 2606.00564: its constants for the two student sizes


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
