"""Exact fused linear losses for Visual Gradient Steering and its relatives: from hidden states to loss and gradients
without an [N, V] tensor. Needs torch and, for its GPU kernels, triton."""

from .divergence import Divergence
from .functional import VGSOutput, fused_linear_vgs_loss, vgs_loss
from .linear_divergence import DivergenceOutput, TargetRow, divergence_loss, fused_linear_divergence
from .modules import FusedLinearDivergence, FusedLinearVGSLoss
from .objective import VGSObjective
from .policy import PolicyTerm

__version__ = "0.1.0"

__all__ = [
    "Divergence",
    "DivergenceOutput",
    "FusedLinearDivergence",
    "FusedLinearVGSLoss",
    "PolicyTerm",
    "TargetRow",
    "VGSObjective",
    "VGSOutput",
    "divergence_loss",
    "fused_linear_divergence",
    "fused_linear_vgs_loss",
    "vgs_loss",
]
