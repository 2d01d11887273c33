"""The language term of gated tokens while a GPU has their rows in memory, before the gate of the call is known.

Each block of logit gradients has a few rows more than its tokens, the *slots*. A token that passes the gate of the
tokens so far gets one, as long as there are any, and its text-only gradient is multiplied out with the block: no host
waits, no row is projected again. Which tokens were formed is compared with the gate at the end (steering.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .plan import GradientView
from .rows import Backend
from .rows.layout import RowTile, quiet

#: Slots beside the share of the tokens that pass: gated tokens come in crowds, and a slot that stays empty is
#: multiplied out all the same.
_SPARE = 1.1
#: Rows for each token of a block, for those that were guessed wrongly: what is known of them comes after the last one.
_LATE = 1 / 16
#: Whole steps of a product's inner size.
_SLOT_MULTIPLE = 16


def slot_share(quantile: float) -> float:
    """Slots for each token of a block."""
    return min(1.0, _SPARE * (1.0 - quantile))


def share_beside(quantile: float) -> float:
    """Rows beside each token of a block: slots, and those that come late."""
    return slot_share(quantile) + _LATE


class GatedRows:
    """Who holds which slot, and the gradients of those who do.

    Args:
        view: text-only hidden states and their gradient, with the ``alpha`` of the block's other rows.
        backend: that ``assigns`` slots.
        weights: [N] d loss / d logits of the term, without the divergence's own slope.
        block: tokens of a gradient block.
        quantile: of the scores that pass.
        limits: [N] that the scores must exceed; None: the quantile of the tokens so far.
        scores: [N], where they are known beforehand.
        counted: [N] bool tokens of which the quantile is, and which may pass; None: all.

    Attributes:
        formed: [N] int32, 1 for tokens whose gradient has been collected.
        held: [S] bool, rows beside the block that was closed that have a token.
        tokens: [S] that token, and any one where there is none.
        dtype: of gradients of hidden states.
    """

    def __init__(
        self,
        view: GradientView,
        backend: Backend,
        weights: Tensor,
        block: int,
        quantile: float,
        limits: Tensor | None = None,
        scores: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> None:
        self.view, self._backend, self._weights = view, backend, weights
        self._block, self._quantile, self._counted = block, quantile, counted
        self._limits = None if limits is None else limits.contiguous()
        self._known, self._exact, self.dtype = scores is not None, False, weights.dtype
        n = len(weights)
        self._scores = torch.empty_like(weights, dtype=torch.float32) if scores is None else scores.float().contiguous()
        self.formed = torch.zeros_like(weights, dtype=torch.int32)
        self._used = weights.new_zeros(1, dtype=torch.int32)
        self._slots = weights.new_empty(n, dtype=torch.int32)
        self._held_by = weights.new_empty(self.slots(block), dtype=torch.int64)

    def know(self, scores: Tensor, limits: Tensor) -> None:
        """Take the scores [N] of all tokens and what they must exceed: nothing is a guess then."""
        self._scores, self._limits = scores, limits.contiguous()
        self._known = self._exact = True

    def slots(self, tokens: int) -> int:
        """How many a block of so many tokens has: if the quantile is theirs, enough for all that pass."""
        return max(math.ceil(slot_share(self._quantile) * tokens / _SLOT_MULTIPLE), 1) * _SLOT_MULTIPLE

    def rows_beside(self) -> int:
        """Rows of a block beside its tokens: slots, and late ones unless the last block has room for them."""
        last = len(self.formed) % self._block or self._block
        free = self._block + self.slots(self._block) - last - self.slots(last)
        return self.slots(self._block) + max(math.ceil(_LATE * self._block) - free, 0)

    def form(self, rows: slice, tile: RowTile, state: Tensor) -> dict[str, Tensor]:
        """Give slots to these tokens, as far as they are likely to pass; what ``RowCoefficients`` then need.

        Args:
            rows: which tokens.
            tile: their four rows over the vocabulary.
            state: [K, R] their statistics.
        """
        start = rows.start // self._block * self._block
        block = self._held_by[: self.slots(min(self._block, len(self.formed) - start))]
        slots = self._slots[rows]
        self._backend.assign(
            *(state, rows, self._scores, self._limits, self._counted, self._quantile),
            *(slots, block, self._used, self.formed),
            known=self._known,
            exact=self._exact,
            first=rows.start == start,
        )
        self._of_block = block
        sums = self._backend.text_totals(tile, state, slots)
        return {"slot": slots, "text_weight": self._weights[rows], "text_sums": sums}

    def close(self, late: Tensor | None = None) -> Tensor:
        """The block's tokens are all there, and these [R] behind its slots; returns ``tokens``."""
        self.held, self.tokens = self._of_block >= 0, self._of_block.clamp(min=0)
        if late is not None:
            self.held = torch.cat([self.held, torch.ones_like(late, dtype=torch.bool)])
            self.tokens = torch.cat([self.tokens, late])
        return self.tokens

    def states(self) -> Tensor:
        """Hidden states of these rows, [S, D]; where there is no token, finite ones: its gradient is 0."""
        return quiet(self.view.states(self.tokens), self.held)

    def add(self, d_hidden: Tensor) -> None:
        """Take the gradients [S, D] of these hidden states."""
        if self.view.d_hidden is not None:
            self.view.d_hidden.index_add_(0, self.tokens, d_hidden)
