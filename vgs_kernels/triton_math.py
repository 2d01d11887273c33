"""What Triton kernels do with the logits of one tile, whatever they compute of them."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
#: A logit that has no weight beside any other, but is finite, so that differences of such logits are.
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def exp(x):
    # tl.exp spends three more instructions on results below 2^-126; these become 0.
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2x + 1) cancels near zero; there, the odd series.
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    return tl.where(x2 < 0.0625, series, 1 - 2 / (exp(2 * x) + 1))


@triton.jit
def transform(x, columns, n_columns, scale, softcap, inv_temperature, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """rows.LogitTransform of logits as they lie in a tile; nothing behind its end."""
    if HAS_CAP:
        capped = _tanh(x * (scale / softcap)) * (softcap * inv_temperature)
        x = tl.where(x == float("-inf"), x, capped) if MASKED else capped
    else:
        x *= scale * inv_temperature
    return tl.where(columns < n_columns, x, float("-inf") if MASKED else NOTHING)


@triton.jit
def anchored(maximum, MASKED: tl.constexpr):
    """What a row is centred at: its maximum, or 0 as long as all columns are masked."""
    return tl.where(maximum == float("-inf"), 0.0, maximum) if MASKED else maximum


@triton.jit
def lane_sum(x):
    """[LANES, WIDTH] -> [LANES]: a thread's own elements."""
    return tl.sum(x, axis=1)


@triton.jit
def cap_slope(z, softcap, inv_temperature):
    """Derivative of the soft-cap; the linear gain is already in the token weights."""
    capped = z * (1 / (softcap * inv_temperature))
    return tl.maximum(1 - capped * capped, 0.0)  # 0 where z is no logit but a mask, or lies behind the tile's end
