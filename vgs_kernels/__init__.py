"""Exact fused linear losses for Visual Gradient Steering and its relatives: from hidden states to loss and gradients
without an [N, V] tensor. Needs torch and, for its GPU kernels, triton."""

from .api import DEFAULT_WORKSPACE_BYTES, divergence_loss, fused_linear_divergence, fused_linear_vgs_loss, vgs_loss
from .divergence import Divergence
from .heads import Head, TargetRow
from .modules import FusedLinearDivergence, FusedLinearVGSLoss
from .objective import VGSObjective
from .outputs import DivergenceOutput, VGSOutput
from .policy import PolicyTerm
from .workspace import release_workspace

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_WORKSPACE_BYTES",
    "Divergence",
    "DivergenceOutput",
    "FusedLinearDivergence",
    "FusedLinearVGSLoss",
    "Head",
    "PolicyTerm",
    "TargetRow",
    "VGSObjective",
    "VGSOutput",
    "divergence_loss",
    "fused_linear_divergence",
    "fused_linear_vgs_loss",
    "release_workspace",
    "vgs_loss",
]
