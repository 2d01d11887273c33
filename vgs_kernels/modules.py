"""nn.Module forms: the fixed options are set once, tensors come with each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from .api import fused_linear_divergence, fused_linear_vgs_loss
from .objective import VGSObjective
from .outputs import DivergenceOutput, VGSOutput


class FusedLinearDivergence(nn.Module):
    """:func:`fused_linear_divergence` with its keyword options held; a call may add or override options.

    Args:
        **options: keyword arguments of the function, looked at when it is called.
    """

    function: ClassVar[Callable[..., VGSOutput | DivergenceOutput]] = staticmethod(fused_linear_divergence)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *inputs: Any, **options: Any) -> VGSOutput | DivergenceOutput:
        return self.function(*inputs, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


class FusedLinearVGSLoss(FusedLinearDivergence):
    """:func:`fused_linear_vgs_loss` with its objective and keyword options held; a call may add or override options.

    Args:
        objective: None means ``VGSObjective()``.
        **options: keyword arguments of the function, looked at when it is called.
    """

    function = staticmethod(fused_linear_vgs_loss)

    def __init__(self, objective: VGSObjective | None = None, **options: Any) -> None:
        self.objective = objective or VGSObjective()
        super().__init__(objective=self.objective, **options)
