"""Exact fused linear losses for Visual Gradient Steering and its relatives: from hidden states to loss and gradients
without an [N, V] tensor. Needs torch and, for its GPU kernels, triton."""

from .functional import (
    DivergenceOutput,
    TargetRow,
    VGSOutput,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)
from .modules import FusedLinearDivergence, FusedLinearVGSLoss
from .objective import VGSObjective

__version__ = "0.1.0"

__all__ = [
    "DivergenceOutput",
    "FusedLinearDivergence",
    "FusedLinearVGSLoss",
    "TargetRow",
    "VGSObjective",
    "VGSOutput",
    "fused_linear_divergence",
    "fused_linear_vgs_loss",
    "vgs_loss",
]
