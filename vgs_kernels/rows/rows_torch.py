"""Statistics of rows in PyTorch: the readable specification of the Triton rows, and the backend of CPUs.

Notation: layout.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import RowTile, RunningStatistics, slices

#: Tokens and elements of a block: an operator's start must be small beside its work, and long stretches of few rows are
#: read faster than short ones of many. The temporaries of a block take 20 MiB.
_BLOCK_ROWS, _BLOCK_ELEMENTS = 64, 1 << 19
_LOG2_E = math.log2(math.e)


class Blocks:
    """The blocks of a tile, and temporaries that all blocks share: memory is slow where it is touched first."""

    def __init__(self, tile: RowTile, like: Tensor, count: int) -> None:
        self._rows, self._columns = tile.student.shape
        height = max(1, min(self._rows, _BLOCK_ROWS))
        self._width = min(self._columns, max(64, _BLOCK_ELEMENTS // height))
        self._memory = like.new_empty(count, height * self._width)

    def rows(self) -> list[slice]:
        return slices(self._rows, _BLOCK_ROWS)

    def columns(self) -> list[slice]:
        return slices(self._columns, self._width)

    def temporaries(self, rows: slice, columns: slice) -> list[Tensor]:
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return list(self._memory[:, : height * width].view(-1, height, width))


def load(tile: RowTile, rows: slice, columns: slice, dtype: torch.dtype) -> dict[str, Tensor]:
    """Transformed logits of one block: s, t and, of four rows, a, w."""
    student, target = tile.student_transform, tile.target_transform
    logits = {"s": (tile.student, student), "t": (tile.target, target)}
    if tile.four:
        logits |= {"a": (tile.student_text, student), "w": (tile.teacher_text, target)}
    return {name: transform(x[rows, columns].to(dtype)) for name, (x, transform) in logits.items()}


def exp(x: Tensor, out: Tensor) -> Tensor:
    """e^x; ``out`` may be x. ``torch.exp`` takes twice as long on a CPU, and twenty times where it underflows."""
    return torch.mul(x, _LOG2_E, out=out).exp2_()


def steered(centred: dict[str, Tensor], masked: bool, out: Tensor) -> Tensor:
    """q' = a' + (t' - w'), and -inf where any of the three is."""
    torch.sub(centred["t"], centred["w"], out=out).add_(centred["a"])
    return out.masked_fill_(centred["w"] == -torch.inf, -torch.inf) if masked else out


def statistics(tile: RowTile, state: Tensor) -> None:
    """Fold a tile into the running statistics ``state`` [K, R], in place."""
    blocks = Blocks(tile, state, 10 if tile.four else 6)
    for rows in blocks.rows():
        _fold(tile, rows, blocks, state[:, rows])


def _fold(tile: RowTile, rows: slice, blocks: Blocks, state: Tensor) -> None:
    """``statistics`` of a few tokens."""
    masked = tile.may_be_masked
    x = RunningStatistics(state)
    block_sums, block_totals = torch.empty_like(x.sums), torch.empty_like(x.totals)

    for columns in blocks.columns():
        *temporaries, difference, product = blocks.temporaries(rows, columns)
        centred, weights = (dict(zip(x.names, temporaries[i::2], strict=True)) for i in range(2))
        logits = load(tile, rows, columns, state.dtype)
        anchors = x.rescale(
            torch.maximum(x.maxima, torch.stack([values.amax(1) for values in logits.values()])), masked
        )
        for name, at, total in zip(x.names, anchors, block_sums, strict=True):
            torch.sub(logits[name], at.unsqueeze(1), out=centred[name])
            torch.sum(exp(centred[name], weights[name]), 1, out=total)
        for (name, (weight, high, low)), total in zip(x.gaps.items(), block_totals, strict=True):
            gap = centred[high] if low is None else torch.sub(centred[high], centred[low], out=difference)
            if masked and name == "s_prior_gap":  # outside the support of q*, where log q* is -inf
                gap.masked_fill_(centred["w"] == -torch.inf, -torch.inf)
            torch.mul(weights[weight], gap, out=product)
            if masked:  # 0 * inf is 0
                product.masked_fill_(weights[weight] == 0, 0)
            torch.sum(product, 1, out=total)
        x.sums += block_sums
        x.totals += block_totals
        if tile.four:
            q = steered(centred, masked, out=difference)
            at = x.rescale_steered(torch.maximum(x.q_max, q.amax(1)))
            x.q_sum.add_(exp(q.sub_(at.unsqueeze(1)), out=q).sum(1))


def one_hot(chosen: Tensor, like: Tensor) -> Tensor:
    """[R, C]: 1 at the columns ``chosen`` [R, 1] that lie inside, else 0."""
    inside = (chosen >= 0) & (chosen < like.shape[1])
    return torch.zeros_like(like).scatter_(1, torch.where(inside, chosen, 0), inside.to(like.dtype))


def chain(gradient: Tensor, logits: Tensor, tile: RowTile) -> Tensor:
    """Multiply by the soft-cap's derivative, 0 at a masked column; the linear gain is already in the weights."""
    transform = tile.student_transform
    if transform.softcap is not None:
        slope = 1 - (logits / (transform.softcap * transform.inv_temperature)).square_()
        gradient = gradient.mul_(slope.clamp_(min=0))
    return gradient.masked_fill_(logits == -torch.inf, 0) if tile.may_be_masked else gradient
