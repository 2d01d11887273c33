"""Where a gradient is: the columns of a block of logit gradients that hold all but a bounded share of it.

Rows of language models are peaked: a few thousand of 150,000 columns hold nearly all of a token's gradient, and the
products with the head and the hidden states are needed for these alone.

The bound. Let g be a token's row of the block, L = sum_j |g_j|, and theta a threshold of this token with ::

    sum of |g_j| over the j with |g_j| < theta   <=   tolerance * L                                          (*)

A column is left out only if it is below the threshold of every token of the block. What a token loses is then a part
of the sum in (*), so at most tolerance * L. Tiles of a cut vocabulary and ranks that share one keep the bound for their
own parts of L, and therefore for the whole.

The threshold is guessed from a sample of the columns, which proves nothing: (*) is then checked on all of them, and a
token that fails it gets a lower threshold. At tolerance * L / (number of columns) it always holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .gemm import UPCAST_COLUMNS
from .rows.layout import accumulation_dtype, slices

if TYPE_CHECKING:
    from .parallel import VocabularyShard

#: Terms of a call with a tolerance, see ``LeftOut``.
SHARES = ("gradient_kept", "gradient_lost", "gradient_tail")
#: Above this share of the columns, gathering them saves little: on a CPU half of them cost 0.73 of all, and 0.67 all.
_BREAK_EVEN = 0.6
#: Runs of columns that are sampled: how long, how far apart at least, how many at most; how much of the tolerance a
#: guess takes, since it errs.
RUN, _EVERY, _MOST_RUNS, _CAUTION = 64, 1024, 256, 0.75
#: Checks in which a threshold is halved before it is set to where it always holds.
_HALVINGS = 3
#: Quarters of an octave: the upper bits of a float32 up to 2.
DROPPED_BITS, _BINS = 21, 512
#: What the rounding of sums could add to what is lost.
_MARGIN = 1e-3
#: Elements of a block of temporaries: in the cache of a CPU; on a GPU, few launches.
_ELEMENTS = {"cpu": 1 << 20}
_MANY_ELEMENTS = 1 << 25
#: A sampled element takes up to 20 bytes.
_SAMPLED_SHARE = 4


def _elements(device_type: str) -> int:
    return _ELEMENTS.get(device_type, _MANY_ELEMENTS)


def temporary_bytes(
    rows: int, columns: int, width: int, dtype: torch.dtype, device_type: str = "cuda", tokens: int = 0
) -> int:
    """Upper bound on what is allocated at a time to find the columns that matter and to multiply them out.

    Args:
        rows, columns: of a block of logit gradients.
        width: of the student's hidden states.
        dtype: of the block and of the head.
        device_type: where it is.
        tokens: of the call.
    """
    own, wide = dtype.itemsize, max(dtype.itemsize, 4)
    elements = max(_elements(device_type), rows)
    few = min(columns, UPCAST_COLUMNS)
    sweep = min(elements, rows * columns) * (own + wide)
    products = rows * few * own + few * width * (own + wide) + min(elements, rows * few) * wide
    return max(sweep, products) + 16 * columns + 16 * rows * _BINS + 64 * tokens


def _magnitudes(d_logits: Tensor, tokens: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """|d_logits| of some of the rows in float32 (float64), a block of columns at a time, in memory that all blocks
    share."""
    columns = d_logits.shape[1]
    rows = d_logits.shape[0] if tokens is None else len(tokens)
    width = max(1, min(columns, _elements(d_logits.device.type) // max(rows, 1)))
    memory = d_logits.new_empty(rows * width, dtype=accumulation_dtype(d_logits))
    for here in slices(columns, width):
        block = d_logits[:, here] if tokens is None else d_logits[tokens, here]
        out = memory[: block.numel()].view(block.shape)
        out = torch.abs(block, out=out) if block.dtype == out.dtype else out.copy_(block).abs_()
        del block  # it may be a copy
        yield here, out


def row_sums(d_logits: Tensor) -> Tensor:
    """sum_j |g_j| and sum_j g_j of the rows, [2, R] in float32 (float64)."""
    sums = d_logits.new_zeros(2, len(d_logits), dtype=accumulation_dtype(d_logits))
    for columns, magnitudes in _magnitudes(d_logits):
        sums[0] += magnitudes.sum(1)
        sums[1] += d_logits[:, columns].sum(1, dtype=sums.dtype)
    return sums


def sampled_runs(columns: int) -> tuple[int, int]:
    """Distance and number of the runs of ``RUN`` columns that are sampled: if there are few columns, all of them."""
    if columns < 4 * _EVERY:
        return RUN, -(-columns // RUN)
    every = _EVERY * -(-columns // (_EVERY * _MOST_RUNS))
    return every, (columns - RUN) // every + 1


def active_columns(d_logits: Tensor, mass: Tensor, tolerance: float, passes: Passes | None = None) -> Tensor | None:
    """Indices of the columns that some token needs, ascending; None where they are too many, or not all finite.

    The host waits for the device.

    Args:
        d_logits: [R, C].
        mass: [R] sums of |d_logits|.
        tolerance: share of its mass that each token may lose, > 0.
        passes: over the block; those of PyTorch if none are given.
    """
    passes = passes or PYTORCH
    allowed, columns = tolerance * (1 - _MARGIN), d_logits.shape[1]
    least = allowed / columns
    thresholds, expected = passes.guess(d_logits, mass, allowed * _CAUTION)
    thresholds.clamp_(min=least)
    if not torch.where(mass.isfinite().all(), expected, torch.inf) <= _BREAK_EVEN:
        return None
    lowest, tokens = mass.new_zeros(columns), None
    for check in range(_HALVINGS + 2):
        here, scale = mass, torch.where(mass > 0, 1 / (thresholds * mass), 0).clamp_(max=torch.finfo(mass.dtype).max)
        if tokens is not None:
            here, scale = mass[tokens], scale[tokens]
        failed = ~(passes.sum_below(d_logits, tokens, scale, lowest) <= allowed * (here * scale))
        at = failed.nonzero().squeeze(1)
        tokens = at if tokens is None else tokens[at]
        if not len(tokens):
            active = (~(lowest > -1)).nonzero().squeeze(1)
            return active if len(active) <= _BREAK_EVEN * columns else None
        thresholds[tokens] = (thresholds[tokens] / 2).clamp_(min=least) if check < _HALVINGS else least
    return None


def guess(d_logits: Tensor, mass: Tensor, allowed: float) -> tuple[Tensor, Tensor]:
    """Thresholds [R] as shares of the mass, and the share of the columns that would be kept, from a sample.

    Args:
        d_logits: [R, C].
        mass: [R] sums of |d_logits|.
        allowed: share of the mass that may be below.
    """
    columns = d_logits.shape[1]
    every, _ = sampled_runs(columns)
    sampled = d_logits.unsqueeze(1) if every == RUN else d_logits.unfold(1, RUN, every)
    count = sampled[0].numel() if len(sampled) else 1
    few = max(1, _elements(d_logits.device.type) // (_SAMPLED_SHARE * count))
    edges, kept = torch.empty_like(mass), torch.zeros(count, dtype=torch.bool, device=mass.device)
    for rows in slices(len(mass), few):
        edges[rows] = _edges(sampled[rows].flatten(1), mass[rows], allowed * (count / columns), kept)
    return edges, kept.float().mean()


def _edges(sample: Tensor, mass: Tensor, allowed: float, kept: Tensor) -> Tensor:
    """Thresholds [R] of sampled columns [R, S], which may hold this much of the mass below; ``kept`` [S] notes those
    that are above one."""
    shares = (sample.abs() / torch.where(mass > 0, mass, 1).unsqueeze(1)).float()
    bins = (shares.view(torch.int32) >> DROPPED_BITS).clamp_(0, _BINS - 1).long()
    sums = shares.new_zeros(len(shares), _BINS).scatter_add_(1, bins, shares).cumsum(1)
    # Whole bins, and never the highest that the sample has: of what is above, it tells nothing.
    fit = (sums <= allowed) & (sums < sums[:, -1:])
    edges = (fit.sum(1).to(torch.int32) << DROPPED_BITS).view(torch.float32)
    lowest_kept = torch.where(mass > 0, edges, torch.inf).clamp_(min=torch.finfo(torch.float32).tiny)
    kept |= shares.div_(lowest_kept.unsqueeze(1)).amax(0) >= 1
    return edges


def sum_below(d_logits: Tensor, tokens: Tensor | None, scale: Tensor, lowest: Tensor) -> Tensor:
    """sum_j scale * |g_j| over scale * |g_j| < 1 of these tokens, [R]; ``lowest`` [C] takes the minima of
    -scale * |g|.

    Args:
        d_logits: [N, C].
        tokens: [R] int64 indices of its rows; None: all.
        scale: [R].
        lowest: [C], at most 0, changed in place.
    """
    sums, scale = torch.zeros_like(scale), -scale.unsqueeze(1)
    for columns, magnitudes in _magnitudes(d_logits, tokens):
        scaled = magnitudes.mul_(scale)
        torch.minimum(lowest[columns], scaled.amin(0), out=lowest[columns])
        sums -= torch.nn.functional.threshold_(scaled, -1.0, 0.0).sum(1)
    return sums


class Passes(NamedTuple):
    """The functions of this module that read a whole block, as one backend has them."""

    row_sums: Callable[[Tensor], Tensor]
    guess: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
    sum_below: Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]


PYTORCH = Passes(row_sums, guess, sum_below)


class LeftOut:
    """What the gradients of a call's tokens lose, over all blocks.

    Args:
        tolerance: share of each token's L1 mass that may be left out, in each view.
        n: tokens.
        like: of the accumulated gradients' dtype and device.
        passes: who reads the blocks; PyTorch if nobody is named.
    """

    def __init__(self, tolerance: float, n: int, like: Tensor, passes: Passes | None = None) -> None:
        self.tolerance, self.passes = tolerance, passes or PYTORCH
        self._sums = like.new_zeros(5, n)

    def add(
        self,
        tokens: Tensor | slice,
        factor: float,
        sums: Tensor,
        kept: Tensor,
        counts: tuple[int, int],
        held: Tensor | None = None,
    ) -> None:
        """Take a block.

        Args:
            tokens: which, each once unless it is said which rows are ``held``.
            factor: of this view.
            sums, kept: [2, R] of all its columns and of those that were multiplied out, see ``row_sums``.
            counts: how many columns were multiplied out, and of how many.
            held: [R] bool, rows that are a token's gradient; others are 0. None: all.
        """
        lost = (sums - kept) * factor
        counted = torch.stack([torch.full_like(sums[0], count) for count in counts])
        block = torch.stack([*counted, lost[0].abs(), sums[0] * abs(factor), lost[1]])
        if held is None:
            self._sums[:, tokens] += block
        else:
            self._sums.index_add_(1, tokens, block * held)

    def terms(self, shard: VocabularyShard) -> Tensor:
        """``SHARES`` [3, N]: of the columns, those multiplied out; of the gradients' L1 mass, what is lost, and the sum
        with its sign of the lost entries. Over all views of a token and all ranks of a shard."""
        shard.sum(self._sums)
        kept, columns, lost, mass, tail = self._sums
        return torch.stack([kept / columns.clamp(min=1), lost / mass, tail / mass]).masked_fill_(mass == 0, 0)
