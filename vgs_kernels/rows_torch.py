"""The row backend in PyTorch, for CPUs and for devices without Triton. See rows.py for the notation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .rows import PAIR_STATE, VGS_STATE, RowCoefficients, RowTile

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


def _fold(logits: Tensor, maximum: Tensor, total: Tensor, gaps: list[tuple[Tensor, Tensor]], masked: bool) -> None:
    """Fold a block of one row into its running (max, sum) and into the sums that its softmax weights, in place."""
    new_maximum = torch.maximum(maximum, logits.amax(1))
    anchor = new_maximum.masked_fill(new_maximum == -torch.inf, 0) if masked else new_maximum
    decay = (maximum - anchor).exp_()
    weights = (logits - anchor.unsqueeze(1)).exp_()
    maximum.copy_(new_maximum)
    total.mul_(decay).add_(weights.sum(1))
    for accumulator, gap in gaps:
        product = weights * gap
        if masked:  # 0 * inf is 0
            product.masked_fill_(weights == 0, 0)
        accumulator.mul_(decay).add_(product.sum(1))


def _steered(student_text: Tensor, view_gap: Tensor, teacher_text: Tensor, masked: bool) -> Tensor:
    """Logits of q*: a + (t - w), and -inf where any of the three is."""
    steered = student_text + view_gap
    return steered.masked_fill_(teacher_text == -torch.inf, -torch.inf) if masked else steered


def statistics(tile: RowTile, state: Tensor) -> None:
    """Fold a tile into the running statistics ``state`` [K, R], in place."""
    x = dict(zip(VGS_STATE if tile.four else PAIR_STATE, state, strict=True))
    masked = tile.may_be_masked
    for columns in _column_blocks(*tile.student.shape):
        s, t, *text = _load(tile, columns, state.dtype)
        s_gaps = [(x["s_logit"], s), (x["s_gap"], s - t)]
        if not text:
            _fold(t, x["t_max"], x["t_sum"], [], masked)
        else:
            a, w = text
            prior_gap, view_gap = a - w, t - w
            s_gaps += [(x["s_prior_gap"], prior_gap), (x["s_view_gap"], s - a)]
            _fold(t, x["t_max"], x["t_sum"], [(x["t_view_gap"], view_gap)], masked)
            _fold(a, x["a_max"], x["a_sum"], [(x["a_gap"], prior_gap)], masked)
            _fold(w, x["w_max"], x["w_sum"], [], masked)
            _fold(_steered(a, view_gap, w, masked), x["q_max"], x["q_sum"], [], masked)
        _fold(s, x["s_max"], x["s_sum"], s_gaps, masked)


def _chain(gradient: Tensor, logits: Tensor, tile: RowTile) -> Tensor:
    """Multiply by the soft-cap's derivative; the linear gain is already in the token weights."""
    transform = tile.student_transform
    if transform.softcap is None:
        return gradient
    return gradient.mul_(1 - (logits / (transform.softcap * transform.inv_temperature)).square_())


def gradient(
    tile: RowTile, coefficients: RowCoefficients, out: Tensor, out_text: Tensor | None = None, add: bool = False
) -> None:
    """Write d_s to ``out`` [R, C], which may be the student's tile itself, and d_a to ``out_text`` if given.

    ``add`` adds to what ``out`` holds.
    """
    c = RowCoefficients(*(None if x is None else x.unsqueeze(1) for x in coefficients))
    masked = tile.may_be_masked
    for columns in _column_blocks(*tile.student.shape):
        s, t, *text = _load(tile, columns, c.weight.dtype)
        p = (s - c.lse).exp_()
        gap = s - t
        if text:
            a, w = text
            prior_gap = (a - w).mul_(c.gamma)
            if masked:  # 0 * inf is 0
                prior_gap.masked_fill_(c.gamma == 0, 0)
            gap = gap.mul_(1 + c.gamma).sub_(prior_gap)
        d_s = _chain(gap.sub_(c.mean_gap).mul_(p).mul_(c.weight), s, tile)
        if masked:  # 0 * inf is 0
            d_s.masked_fill_(p == 0, 0)
        if out_text is not None:
            q = (_steered(a, t - w, w, masked) - c.steered_lse).exp_()
            d_a = _chain(q.sub_(p).mul_(c.prior_weight), a, tile)
            out_text[:, columns] = d_a.masked_fill_(a == -torch.inf, 0) if masked else d_a
        if add:
            d_s.add_(out[:, columns])
        out[:, columns] = d_s
