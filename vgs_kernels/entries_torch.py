"""The entry backend in PyTorch. See entries.py for the mathematics and rows_torch.py for how a tile is cut."""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import Divergence
from .entries import EntryCoefficients, entry, entry_slope, log_sums
from .rows import PAIR_STATE, RowTile, anchor
from .rows_torch import Blocks, chain, exp, load, one_hot


def _distributions(
    tile: RowTile, rows: slice, columns: slice, state: Tensor, blocks: Blocks
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Logits of a block, and p, q and s' - t', [R, C] each, in the blocks' memory."""
    x = {name: values[rows].unsqueeze(1) for name, values in zip(PAIR_STATE, state, strict=True)}
    p, q, difference = blocks.temporaries(rows, columns)
    logits = load(tile, rows, columns, state.dtype)
    s = torch.sub(logits["s"], anchor(x["s_max"]), out=p)
    t = torch.sub(logits["t"], anchor(x["t_max"]), out=q)
    torch.sub(s, t, out=difference)
    return logits, [exp(s, out=p).div_(x["s_sum"]), exp(t, out=q).div_(x["t_sum"]), difference]


def totals(
    tile: RowTile, state: Tensor, divergence: Divergence, limit: Tensor | None, sums: Tensor, tails: Tensor
) -> None:
    """Add a tile's part to ``SUMS`` and, with a limit, to ``TAILS``, [2, R] each.

    Args:
        state: [K, R] statistics over all columns.
        limit: [R], as in ``EntryCoefficients``.
    """
    blocks = Blocks(tile, state, 3)
    shift = log_sums(state)
    for rows in blocks.rows():
        for columns in blocks.columns():
            logits, (p, q, difference) = _distributions(tile, rows, columns, state, blocks)
            r = difference.sub_(shift[rows].unsqueeze(1))
            value, slope = entry(p, q, r, divergence, masked=tile.may_be_masked)
            if limit is not None:
                inside = tile.student[rows, columns] >= limit[rows].unsqueeze(1)
                value.masked_fill_(~inside, 0)
                slope.masked_fill_(~inside, 0)
                for name, tail in zip("st", tails[:, rows], strict=True):
                    top = anchor(state[PAIR_STATE.index(f"{name}_max"), rows])
                    found = logits[name].masked_fill(inside, -torch.inf).logsumexp(1).sub_(top)
                    torch.logaddexp(tail, found, out=tail)
            sums[0, rows] += value.sum(1)
            sums[1, rows] += slope.sum(1)


def gradient(
    tile: RowTile, state: Tensor, divergence: Divergence, coefficients: EntryCoefficients, out: Tensor
) -> None:
    """Write d_s to ``out`` [R, C], which may be the student's tile itself."""
    blocks = Blocks(tile, state, 3)
    shift = log_sums(state)
    for rows in blocks.rows():
        scalars = [None if value is None else value[rows].unsqueeze(1) for value in coefficients]
        weight, mean_slope, tail_slope, limit, policy, chosen = scalars
        for columns in blocks.columns():
            logits, (p, q, difference) = _distributions(tile, rows, columns, state, blocks)
            if divergence.kind == "forward_kl" and divergence.clip is None:
                slope = q.neg_()
            else:
                r = difference.sub_(shift[rows].unsqueeze(1))
                slope = entry_slope(p, q, r, divergence, masked=tile.may_be_masked)
            if limit is not None:
                slope = torch.where(tile.student[rows, columns] < limit, p * tail_slope, slope)
            d_s = torch.addcmul(slope, p, mean_slope, value=-1, out=difference).mul_(weight)
            if tile.may_be_masked:
                d_s.masked_fill_(weight == 0, 0)
            if policy is not None:
                d_s.add_(one_hot(chosen, columns, p).sub_(p).mul_(policy))
            d_s = chain(d_s, logits["s"], tile)
            if tile.may_be_masked:
                d_s.masked_fill_(logits["s"] == -torch.inf, 0)
            out[rows, columns] = d_s
