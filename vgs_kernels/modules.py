"""nn.Module forms: the objective and the fixed options are set once, tensors come with each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .functional import VGSOutput, fused_linear_vgs_loss
from .linear_divergence import DivergenceOutput, TargetRow, fused_linear_divergence
from .objective import VGSObjective


class FusedLinearVGSLoss(nn.Module):
    """:func:`fused_linear_vgs_loss` with its objective and keyword options held; a call may add or override options.

    Args:
        objective: None means ``VGSObjective()``.
        **options: keyword arguments of the function, looked at when it is called.
    """

    def __init__(self, objective: VGSObjective | None = None, **options: Any) -> None:
        super().__init__()
        self.objective = VGSObjective() if objective is None else objective
        self.options = options

    def forward(
        self,
        student_hidden: Tensor,
        student_text_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_text_hidden: Tensor,
        teacher_weight: Tensor,
        **options: Any,
    ) -> VGSOutput:
        return fused_linear_vgs_loss(
            student_hidden, student_text_hidden, student_weight, teacher_hidden, teacher_text_hidden, teacher_weight,
            **{"objective": self.objective, **self.options, **options},
        )  # fmt: skip

    def extra_repr(self) -> str:
        return ", ".join([f"objective={self.objective}", *(f"{k}={v}" for k, v in self.options.items())])


class FusedLinearDivergence(nn.Module):
    """:func:`fused_linear_divergence` with its keyword options held; a call may add or override options.

    Args:
        **options: keyword arguments of the function, looked at when it is called.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(
        self, student_hidden: Tensor, student_weight: Tensor, target: Sequence[TargetRow | tuple], **options: Any
    ) -> DivergenceOutput:
        return fused_linear_divergence(student_hidden, student_weight, target, **{**self.options, **options})

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.options.items())
