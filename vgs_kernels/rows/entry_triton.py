"""One entry of a divergence in Triton; entries_torch.py has the mathematics, in PyTorch."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .triton_common import exp

REVERSE, _FORWARD, _EVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)
#: The gradient of the sampled one is a policy's alone, whatever is multiplied by its weights of 0. A JSD of halves has
#: a kernel of its own, which is shorter.
KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2, "even_jsd": 3, "sampled_reverse_kl": 1}
#: Of an exponent, where it lies in a float.
_LOG_2 = tl.constexpr(math.log(2) / 2**23)


@triton.jit
def _expm1(x):
    """Of x <= 0: near 0 a polynomial, for e^x - 1 cancels there."""
    q = 0.499998689 + x * (0.166643888 + x * (0.0415365361 + x * (0.00800263416 + x * 0.000993462279)))
    return tl.where(x > -0.8, x + x * x * q, exp(x) - 1)


@triton.jit
def _log1p(f, FAR: tl.constexpr):
    """Of -1/2 <= f <= 0 or, FAR, of all above -1: then 1 + f = 2^k * (1 + g), whose logarithms do not cancel."""
    if FAR:  # of floats as integers: the one above 1/2, what holds an exponent, and 1
        k = ((1 + f).to(tl.int32, bitcast=True) - 0x3F000001) & -0x800000  # times 2^23
        scale = (0x3F800000 - k).to(tl.float32, bitcast=True)
        f = f * scale + (scale - 1)
    high = 0.180955157 + f * (1.20872128 + f * (1.63959920 + f * 1.41455269))
    q = -0.499995232 + f * (0.333632112 + f * (-0.243682534 + f * (0.263691545 + f * high)))
    found = f + f * f * q
    return k.to(tl.float32) * _LOG_2 + found if FAR else found


@triton.jit
def _balanced(plain, y, x):
    """y * (e^x - 1 - x), which is ``plain`` where x is not small."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720)))))
    return tl.where(tl.abs(x) < 0.1, y * series, plain)


@triton.jit
def entry(p, q, r, beta, clip, KIND: tl.constexpr, CLIP: tl.constexpr, MASKED: tl.constexpr):
    """An entry and p times its derivative, as entries_torch.entry. Of the JSD ``least`` - ``larger`` is log(p / m),
    and -(``most`` + ``larger``) log(q / m)."""
    if KIND == REVERSE:
        value = p * r
        if MASKED:
            value = tl.where(p > 0, value, 0.0)
        slope = value + p if CLIP else value
        if not CLIP:
            value = _balanced(value - p + q, p, -r)
    elif KIND == _FORWARD:
        value = -q * r
        if MASKED:
            value = tl.where(q > 0, value, 0.0)
        slope = -q
        if not CLIP:
            value = _balanced(value + p - q, q, r)
    else:
        least = tl.minimum(r, 0.0)
        most = tl.maximum(r, 0.0)
        share = 0.5 if KIND == _EVEN else tl.where(r >= 0, beta, 1 - beta)
        larger = _log1p(share * _expm1(-tl.abs(r)), KIND != _EVEN)
        slope = (1 - beta) * p * (least - larger)
        value = beta * q * (most + larger)
        if MASKED:
            slope = tl.where(p > 0, slope, 0.0)
            value = tl.where(q > 0, value, 0.0)
        value = slope - value
    if CLIP:
        slope = tl.where(value > clip, 0.0, slope)
        value = tl.minimum(value, clip)
    return value, slope
