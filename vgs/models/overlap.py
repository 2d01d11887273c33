"""How many of their likeliest tokens two models share, from hidden states and heads, a block of the vocabulary at a
time."""

from __future__ import annotations

import torch
from torch import Tensor

from .heads import Head

MOST_COLUMNS = 8192  # of a block of logits


@torch.no_grad()
def top_k_overlap(
    rows: Tensor, head: Head, other_rows: Tensor, other_head: Head, k: int, vocab_size: int | None, workspace_bytes: int
) -> Tensor:
    """[N] float32 |top-k of one & top-k of the other| / k of each token.

    It costs one product of each model's hidden states with its head, 2 * N * V * (D1 + D2) operations in float32, on
    top of the loss; no [N, V] tensor is made.

    Args:
        rows, other_rows: [N, D1] and [N, D2] hidden states, on the device of the heads.
        head, other_head: of the two models.
        k: likeliest tokens; at most the columns in use.
        vocab_size: leading columns to use; None: as many as both heads have.
        workspace_bytes: bound of a block of logits and what is made of it.
    """
    total = vocab_size or min(len(head.weight), len(other_head.weight))
    columns = max(k, min(MOST_COLUMNS, workspace_bytes // max(16 * len(rows), 1)))
    with torch.autocast(rows.device.type, enabled=False):  # ranks among rounded logits would be chance
        own, others = (_likeliest(*x, k, total, columns) for x in ((rows, head), (other_rows, other_head)))
    joined = torch.cat([own, others], dim=1).sort(dim=1).values
    return (joined[:, 1:] == joined[:, :-1]).sum(dim=1) / k


def _likeliest(rows: Tensor, head: Head, k: int, total: int, columns: int) -> Tensor:
    """[N, k] int64 ids of the greatest logits."""
    best = rows.new_empty(len(rows), 0, dtype=torch.float32)
    ids = rows.new_empty(len(rows), 0, dtype=torch.int64)
    for first in range(0, total, columns):
        end = min(first + columns, total)
        bias = None if head.bias is None else head.bias[first:end]
        block = Head(head.weight[first:end], bias, head.logit_scale, head.softcap).logits(rows)
        values, places = block.topk(min(k, end - first), dim=1)
        values, ids = torch.cat([best, values], dim=1), torch.cat([ids, places + first], dim=1)
        best, order = values.topk(min(k, values.shape[1]), dim=1)
        ids = ids.gather(1, order)
    return ids
