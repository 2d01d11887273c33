"""What the public functions do with arguments that they share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .parallel import group_name
from .policy import PolicyTerm
from .rows import accumulation_dtype

DEFAULT_WORKSPACE_BYTES = 5 * 2**28


def detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def needs(*tensors: Tensor | None) -> list[bool]:
    return [x is not None and x.requires_grad and torch.is_grad_enabled() for x in tensors]


def group(vocab_group: torch.distributed.ProcessGroup | None) -> str | None:
    return None if vocab_group is None else group_name(vocab_group)


def token_weights(weights: Tensor | None, like: Tensor) -> Tensor:
    """[N] weights in the precision of sums; None stands for 1/N each."""
    n = len(like)
    dtype = accumulation_dtype(like)
    if weights is None:
        return torch.full((n,), 1.0 / max(n, 1), dtype=dtype, device=like.device)
    return checks.per_token("token_weights", weights, like).to(dtype)


def target_ids(ids: Tensor | None, like: Tensor, vocab: int | None) -> Tensor | None:
    ids = checks.per_token("target_ids", ids, like, integer=True)
    checks.ids_in_vocabulary("target_ids", ids, vocab)
    return ids


def policy_term(policy: PolicyTerm | None, target_ids: Tensor | None, like: Tensor) -> list[Any]:
    """A policy term as operators take it: advantages, weights, old log-probabilities, epsilons."""
    if policy is None:
        return [None, None, None, [0.0, 0.0]]
    if not isinstance(policy, PolicyTerm):
        raise TypeError(f"policy must be a PolicyTerm or None, got {type(policy).__name__}.")
    if target_ids is None:
        raise ValueError("target_ids must be given with a policy, got None.")
    vectors = {name: getattr(policy, name) for name in ("advantages", "weights", "old_logps")}
    vectors = {name: checks.per_token(f"policy.{name}", value, like) for name, value in vectors.items()}
    for name in ("advantages", "weights"):
        if vectors[name] is None:
            raise TypeError(f"policy.{name} must be a torch.Tensor, got NoneType.")
    epsilons = [checks.number(f"policy.{name}", getattr(policy, name)) for name in ("epsilon_low", "epsilon_high")]
    for name, value in zip(("epsilon_low", "epsilon_high"), epsilons, strict=True):
        if value < 0:
            raise ValueError(f"policy.{name} must be >= 0, got {value}.")
    return [*vectors.values(), epsilons]
