"""The rows in PyTorch: the readable specification of the Triton rows, and the backend of CPUs. Notation: layout.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import VGS_STATE, RowCoefficients, RowTile, RunningStatistics, anchor, slices

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


def _steered(centred: dict[str, Tensor], masked: bool, out: Tensor) -> Tensor:
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
            steered = _steered(centred, masked, out=difference)
            at = x.rescale_steered(torch.maximum(x.q_max, steered.amax(1)))
            x.q_sum.add_(exp(steered.sub_(at.unsqueeze(1)), out=steered).sum(1))
    x.store()


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


def gradient(
    tile: RowTile, state: Tensor, coefficients: RowCoefficients, out: Tensor, out_text: Tensor | None = None
) -> None:
    """Of four rows: write d_s to ``out`` [R, C], of a live prior d_a to ``out_text``, maybe the student's tiles.

    Args:
        state: [K, R] statistics over all columns.
    """
    masked = tile.may_be_masked
    blocks = Blocks(tile, state, 6)
    for rows in blocks.rows():
        x = {name: values[rows].unsqueeze(1) for name, values in zip(VGS_STATE, state, strict=True)}
        scalars = [value[rows].unsqueeze(1) if isinstance(value, Tensor) else value for value in coefficients]
        weight, mean_gap, gamma, live_prior, policy, chosen = scalars
        for columns in blocks.columns():
            p, *temporaries = blocks.temporaries(rows, columns)
            logits = load(tile, rows, columns, state.dtype)
            centred = {
                name: torch.sub(values, anchor(x[f"{name}_max"]), out=temporary)
                for (name, values), temporary in zip(logits.items(), temporaries, strict=False)
            }
            exp(centred["s"], out=p).div_(x["s_sum"])
            if live_prior:
                q = _steered(centred, masked, out=temporaries[-1]).sub_(anchor(x["q_max"]))
                d_a = exp(q, out=q).div_(x["q_sum"]).sub_(p).mul_(weight * gamma)
                if masked:  # 0 * inf is 0
                    d_a.masked_fill_(weight * gamma == 0, 0)
                out_text[rows, columns] = chain(d_a, logits["a"], tile)
            gap = centred["s"].sub_(centred["t"])
            prior_gap = centred["a"].sub_(centred["w"])
            if masked:  # 0 * inf is 0
                prior_gap.masked_fill_(gamma == 0, 0)
            gap.mul_(1 + gamma).addcmul_(prior_gap, gamma, value=-1).sub_(mean_gap)
            pull = None if policy is None else one_hot(chosen - columns.start, p).sub_(p).mul_(policy)
            p_weight = p.mul_(weight)
            d_s = gap.mul_(p_weight)
            if masked:
                d_s.masked_fill_(p_weight == 0, 0)
            if pull is not None:
                d_s.add_(pull)
            out[rows, columns] = chain(d_s, logits["s"], tile)
