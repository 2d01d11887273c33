"""Floating-point numbers as a GPU treats them, in NumPy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x: NDArray) -> NDArray:
    """Subnormal numbers as zeros of their sign (``.ftz``)."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def fma(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    """x * y + z with one rounding. The sum is rounded to 53 bits first: to odd, so that this does not show."""
    product = x.astype(np.float64) * y.astype(np.float64)  # exact: 48 bits
    addend = z.astype(np.float64)
    total = np.asarray(product + addend)
    part = total - product
    error = (product - (total - part)) + (addend - part)  # what the sum lost, exactly
    bits = total.view(np.int64)
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)  # where the exact sum is larger in magnitude
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64).astype(np.float32)


def fma_double(x: NDArray, y: NDArray, z: NDArray) -> NDArray:
    """The same of float64, whose product is two numbers; what is not finite is rounded twice."""
    product = x * y
    (high, low), (y_high, y_low) = (_halves(value) for value in (x, y))
    error = ((high * y_high - product) + high * y_low + low * y_high) + low * y_low
    total = product + z
    part = total - product
    exact = total + (error + ((product - (total - part)) + (z - part)))
    return np.where(np.isfinite(exact), exact, total)


def _halves(x: NDArray) -> tuple[NDArray, NDArray]:
    """float64 as a sum of two numbers of 26 bits (Veltkamp)."""
    scaled = x * np.float64(2**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


def coarse(x: NDArray) -> NDArray:
    """float64 without its lower word, as approximate instructions return it."""
    return (np.asarray(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def bfloat16_bits(x: NDArray) -> NDArray:
    """float32 rounded to nearest, ties to even; every NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def truncated_bfloat16_bits(x: NDArray) -> NDArray:
    """float32 rounded towards zero."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return np.where(np.isnan(x), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def from_bfloat16(bits: NDArray) -> NDArray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float16_bits(x: NDArray) -> NDArray:
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x, np.float32).astype(np.float16).view(np.uint16))


def from_float16(bits: NDArray) -> NDArray:
    return np.ascontiguousarray(bits).view(np.float16).astype(np.float32)


class Approximation:
    """What an approximate instruction returns: the exact value rounded to nearest, or up to ``ulp`` beside it.

    The error depends on the value and on nothing else: on a GPU the same input gives the same result every time.

    Args:
        seed: of the errors; None for none.
        ulp: units in the last place.
    """

    def __init__(self, seed: int | None, ulp: int = 2) -> None:
        self._seed, self._ulp = seed, ulp

    def __call__(self, exact: NDArray) -> NDArray:
        """float64 -> float32."""
        rounded = np.asarray(exact.astype(np.float32))
        if self._seed is None:
            return rounded
        mixed = np.asarray(exact).view(np.uint64) * np.uint64(0x9E3779B97F4A7C15 + 2 * self._seed)
        error = (mixed >> np.uint64(40)) % np.uint64(2 * self._ulp + 1)
        moved = (rounded.view(np.int32) + error.astype(np.int32) - self._ulp).view(np.float32)
        normal = np.isfinite(rounded) & np.isfinite(moved) & (np.abs(rounded) > 2 * _SMALLEST_NORMAL)
        return np.where(normal, moved, rounded)
