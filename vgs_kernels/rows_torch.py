"""The row backend in PyTorch, for CPUs and for devices without Triton. See rows.py for the notation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import GAPS, PAIR_STATE, VGS_STATE, RowCoefficients, RowTile

#: Elements of a temporary: small enough for the second-level cache of a CPU core.
_BLOCK_ELEMENTS = 1 << 18


def _column_blocks(rows: int, columns: int) -> Iterator[slice]:
    width = max(64, _BLOCK_ELEMENTS // max(rows, 1))
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def _load(tile: RowTile, columns: slice, dtype: torch.dtype) -> list[Tensor]:
    """Transformed logits of one column block: [s, t] or [s, t, a, w]."""
    student, target = tile.student_transform, tile.target_transform
    rows = [student(tile.student[:, columns].to(dtype)), target(tile.target[:, columns].to(dtype))]
    if tile.four:
        rows += [student(tile.student_text[:, columns].to(dtype)), target(tile.teacher_text[:, columns].to(dtype))]
    return rows


def _anchor(maximum: Tensor) -> Tensor:
    """What a row is centred at: its maximum, or 0 as long as all columns are masked."""
    return maximum.masked_fill(maximum == -torch.inf, 0)


def _steered(centred: dict[str, Tensor], masked: bool) -> Tensor:
    """q' = a' + (t' - w'), and -inf where any of the three is."""
    steered = centred["a"] + (centred["t"] - centred["w"])
    return steered.masked_fill_(centred["w"] == -torch.inf, -torch.inf) if masked else steered


def _raise_maximum(maximum: Tensor, total: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Fold a block into a running maximum and discount the sum of exp for it; returns (anchor, discount)."""
    old = maximum.clone()
    torch.maximum(maximum, logits.amax(1), out=maximum)
    anchor = _anchor(maximum)
    discount = (old - anchor).exp_()
    total.mul_(discount)
    return anchor, discount


def statistics(tile: RowTile, state: Tensor) -> None:
    """Fold a tile into the running statistics ``state`` [K, R], in place."""
    names = VGS_STATE if tile.four else PAIR_STATE
    x = dict(zip(names, state, strict=True))
    masked = tile.may_be_masked
    for columns in _column_blocks(*tile.student.shape):
        centred, weights, shift, discount = {}, {}, {}, {}
        before = {name: total.clone() for name, total in x.items() if name.endswith("_sum")}
        for row, logits in zip("staw", _load(tile, columns, state.dtype), strict=False):
            old_anchor = _anchor(x[f"{row}_max"])
            anchor, discount[row] = _raise_maximum(x[f"{row}_max"], x[f"{row}_sum"], logits)
            shift[row] = old_anchor - anchor
            centred[row] = logits - anchor.unsqueeze(1)
            weights[row] = centred[row].exp()
            x[f"{row}_sum"] += weights[row].sum(1)
        for name, (row, upper, lower) in GAPS.items():
            if name not in x:
                continue
            # What was summed before was centred at the old anchors.
            offset = shift[upper] if lower is None else shift[upper] - shift[lower]
            x[name].add_(offset * before[f"{row}_sum"]).mul_(discount[row])
            if masked:  # 0 * inf is 0: nothing of it is left beside the new maximum
                x[name].masked_fill_(discount[row] == 0, 0)
            gap = centred[upper] if lower is None else centred[upper] - centred[lower]
            if masked and name == "s_prior_gap":  # outside the support of q*, where log q* is -inf
                gap.masked_fill_(centred["w"] == -torch.inf, -torch.inf)
            product = weights[row] * gap
            if masked:  # 0 * inf is 0
                product.masked_fill_(weights[row] == 0, 0)
            x[name] += product.sum(1)
        if tile.four:
            x["q_max"] += shift["a"] + shift["t"] - shift["w"]
            steered = _steered(centred, masked)
            anchor, _ = _raise_maximum(x["q_max"], x["q_sum"], steered)
            x["q_sum"] += (steered - anchor.unsqueeze(1)).exp_().sum(1)


def _chain(gradient: Tensor, logits: Tensor, tile: RowTile) -> Tensor:
    """Multiply by the soft-cap's derivative; the linear gain is already in the token weights."""
    transform = tile.student_transform
    if transform.softcap is None:
        return gradient
    return gradient.mul_(1 - (logits / (transform.softcap * transform.inv_temperature)).square_())


def gradient(
    tile: RowTile,
    state: Tensor,
    coefficients: RowCoefficients,
    out: Tensor,
    out_text: Tensor | None = None,
    add: bool = False,
) -> None:
    """Write d_s to ``out`` [R, C], which may be the student's tile itself, and d_a to ``out_text`` if given.

    ``state`` [K, R] are the statistics over all columns; ``add`` adds to what ``out`` holds.
    """
    x = {name: values.unsqueeze(1) for name, values in zip(VGS_STATE, state, strict=False)}
    weight, mean_gap, gamma = (values.unsqueeze(1) for values in coefficients)
    masked = tile.may_be_masked
    for columns in _column_blocks(*tile.student.shape):
        logits = dict(zip("staw", _load(tile, columns, state.dtype), strict=False))
        centred = {row: values - _anchor(x[f"{row}_max"]) for row, values in logits.items()}
        p = centred["s"].exp().div_(x["s_sum"])
        gap = centred["s"] - centred["t"]
        if tile.four:
            prior_gap = (centred["a"] - centred["w"]).mul_(gamma)
            if masked:  # 0 * inf is 0
                prior_gap.masked_fill_(gamma == 0, 0)
            gap = gap.mul_(1 + gamma).sub_(prior_gap)
        p_weight = p * weight
        d_s = _chain(gap.sub_(mean_gap).mul_(p_weight), logits["s"], tile)
        if masked:
            d_s.masked_fill_(p_weight == 0, 0)
        if out_text is not None:
            q = (_steered(centred, masked) - _anchor(x["q_max"])).exp_().div_(x["q_sum"])
            d_a = _chain(q.sub_(p).mul_(weight * gamma), logits["a"], tile)
            if masked:
                d_a.masked_fill_((logits["a"] == -torch.inf) | (weight * gamma == 0), 0)
            out_text[:, columns] = d_a
        if add:
            d_s.add_(out[:, columns])
        out[:, columns] = d_s
