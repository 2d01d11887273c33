"""Tiles of logits for the row backends."""

from __future__ import annotations

import torch

from vgs_kernels.rows.layout import LogitTransform, RowTile


def make_tile(n, columns, *, width=None, dtype=torch.float32, four=True, masked=False, softcap=None) -> RowTile:
    """Rows that are ``width`` apart; what stands between them is as large as nothing that counts."""
    width = width or columns
    rows = []
    for _ in range(4 if four else 2):
        row = 3 * torch.randn(n, width, dtype=torch.float64)
        row[:, columns // 3] += 12
        row[:, columns:] = 1e4
        if masked:
            row[:, columns // 2 : columns // 2 + 3] = -torch.inf
        rows.append(row.to(dtype)[:, :columns])
    transform = LogitTransform(0.7, softcap, 1.25)
    return RowTile(*rows, *[None] * (4 - len(rows)), transform, LogitTransform(inv_temperature=1.25), masked, width)
