"""Kernels that a call does not depend on for its result, called by themselves: what they find is checked or put right
later, so that a wrong guess would show in nothing but time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vgs_kernels import active_columns
from vgs_kernels.rows import columns_triton, slots_triton
from vgs_kernels.rows.layout import VGS_STATE

Run = Callable[[str], dict[str, Tensor]]
FLAG = (False, True)
TOKENS, SLOTS, QUANTILE, LIMIT = 4456, 32, 0.7, 0.6
#: Tokens of three tiles, of which the first two are of one block; scores of those between them and the third are there.
_TILES = (slice(0, 120), slice(120, 200), slice(4200, TOKENS))
#: Of more scores, so many are looked at.
_SAMPLES = slots_triton.LAYOUT["SAMPLES"]


_OF_TILES = torch.zeros(TOKENS, dtype=torch.bool)
for _tile in _TILES:
    _OF_TILES[_tile] = True


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _state() -> Tensor:
    """Statistics of four rows, of which some tokens' are not finite, or of no column."""
    state = _normal(len(VGS_STATE), TOKENS).abs() + 0.5
    state[VGS_STATE.index("t_view_gap"), 0] = 9.0  # above every quantile
    state[VGS_STATE.index("a_gap"), 7] = torch.inf
    state[VGS_STATE.index("a_gap"), 11] = torch.nan
    state[VGS_STATE.index("a_sum"), 13::16] = 0
    state[VGS_STATE.index("w_sum"), 5::16] = torch.inf
    return state


def slots(limited: bool, known: bool, ignored: bool, exact: bool) -> Run:
    """Who gets a slot, in three tiles and two blocks."""
    counted = torch.arange(TOKENS) % 5 != 0 if ignored else torch.ones(TOKENS, dtype=torch.bool)
    given, limits = _normal(TOKENS, seed=1).abs(), torch.full((TOKENS,), LIMIT) if limited or known else None

    def expected() -> dict[str, Tensor]:
        x, found = dict(zip(VGS_STATE, _state(), strict=True)), {}
        scores = (x["t_view_gap"] / x["t_sum"] + (x["w_sum"] / x["t_sum"]).log()).clamp(min=0)
        scores = given if known else torch.where(counted & _OF_TILES, scores, torch.where(_OF_TILES, torch.nan, given))
        formed, slot = torch.zeros(TOKENS, dtype=torch.int32), torch.full((TOKENS,), -1, dtype=torch.int32)
        for index, rows in enumerate(_TILES):
            if index != 1:
                tokens, used = torch.full((SLOTS,), -1), 0
            step = max(rows.stop / _SAMPLES, 1.0)
            at = (torch.arange(_SAMPLES) * step).int()
            seen = scores[at[at < rows.stop]]
            ordered = seen[~seen.isnan()].sort().values
            limit = LIMIT if limits is not None else ordered[int(QUANTILE * (len(ordered) - 1))]
            for token in range(rows.start, rows.stop):
                finite = x["a_gap"][token].isfinite() and x["a_sum"][token] > 0 and x["w_sum"][token].isfinite()
                passes = scores[token] > limit and counted[token] and (exact or finite)
                if passes and used < SLOTS:
                    formed[token], slot[token], tokens[used] = 1, used, token
                    used += 1
            found |= {f"tokens of tile {index}": tokens.clone(), f"used in tile {index}": torch.tensor([used])}
        return found | {"formed": formed, "slots": slot} | ({} if known else {"scores": scores})

    def run(backend: str) -> dict[str, Tensor]:
        if backend == "torch":
            return expected()
        state, found = _state(), {}
        scores = given if known else torch.where(_OF_TILES, torch.nan, given)
        formed, slot = torch.zeros(TOKENS, dtype=torch.int32), torch.full((TOKENS,), -1, dtype=torch.int32)
        tokens, used = torch.empty(SLOTS, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        for index, rows in enumerate(_TILES):
            slots_triton.assign(
                *(state[:, rows], rows, scores, limits, counted if ignored else None, QUANTILE),
                *(slot[rows], tokens, used, formed),
                known=known,
                exact=exact,
                first=index != 1,
            )
            found |= {f"tokens of tile {index}": tokens.clone(), f"used in tile {index}": used.to(torch.int64)}
        return found | {"formed": formed, "slots": slot} | ({} if known else {"scores": scores})

    return run


#: Of a block of gradients.
BLOCKS: dict[str, tuple[int, int, int, torch.dtype]] = {
    "float32": (19, 700, 704, torch.float32),
    "bfloat16": (19, 704, 768, torch.bfloat16),
    "long rows": (3, 5000, 5056, torch.bfloat16),
}


def passes(block: str) -> Run:
    """What the passes over a block find."""

    def run(backend: str) -> dict[str, Tensor]:
        rows, columns, pitch, dtype = BLOCKS[block]
        x = (3 * _normal(rows, pitch)).softmax(1) * _normal(rows, pitch, seed=1)
        x[1] = 0
        x[:, columns:] = torch.nan  # nobody reads it
        x = x.to(dtype)[:, :columns]
        by = active_columns.PYTORCH if backend == "torch" else columns_triton.PASSES
        sums = by.row_sums(x)
        found = {"sums": sums, "thresholds": by.guess(x, sums[0], 0.02)[0]}
        scale = torch.linspace(100, 2000, rows)
        some = torch.arange(0, rows, 2)
        for name, tokens in (("all", None), ("some", some)):
            lowest = torch.zeros(columns)
            found[f"below of {name}"] = by.sum_below(x, tokens, scale if tokens is None else scale[tokens], lowest)
            found[f"lowest of {name}"] = lowest
        return found

    return run


GROUPS: list[tuple[str, Callable[..., Run], dict[str, Any]]] = [
    ("slots alone", slots, {"limited": FLAG, "known": FLAG, "ignored": FLAG, "exact": FLAG}),
    ("passes alone", passes, {"block": BLOCKS}),
]
