"""Random projections of gradients: inner products of vectors with billions of entries from some thousand numbers each.

A projection adds up all entries of a vector with random signs into ``WIDTH`` places, an entry into the place that its
number leaves modulo ``WIDTH`` (a count sketch). The inner product of two projections is that of the vectors on average,
off by about |a| |b| / sqrt(WIDTH). Several projections with other signs say by how much it is off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: A prime, so that entries at equal places of a matrix's rows go to different places.
WIDTH = 4093
MOST = 32  # a hash has so many bits that are used
CHUNK = 2**21  # entries at once: bounds the memory for their numbers
_MULTIPLIERS = (-7046029254386353131, -4417276706812531889)  # of splitmix64, as signed numbers


def random_bits(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """[count] int64 hashes of the numbers ``first``, ``first + 1``, ... whose low 32 bits are as good as random.

    A function of number and seed alone (a counter-based generator): the same on every device, in any order.

    Args:
        first, count: of the numbers. seed: of the hash. device: of the result.
    """
    x = torch.arange(first, first + count, dtype=torch.int64, device=device)
    x = (x + seed * 1_000_003 + 1) * _MULTIPLIERS[0]
    for multiplier in _MULTIPLIERS:
        x = (x ^ ((x >> 30) & (2**34 - 1))) * multiplier
    return (x ^ ((x >> 32) & (2**32 - 1))) & (2**32 - 1)


def project(vectors: Sequence[Tensor], repeats: int, seed: int = 0) -> Tensor:
    """[repeats, WIDTH] float64 projections of one long vector.

    Args:
        vectors: its parts, of any shapes, such as the gradients of all parameters.
        repeats: projections with signs of their own, at most ``MOST``.
        seed: of the signs.
    """
    total, first = None, 0
    for part in vectors:
        flat = part.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            chunk = flat[start : start + CHUNK]
            bits = random_bits(first + start, len(chunk), seed, chunk.device)
            padding = -len(chunk) % WIDTH
            rows = []
            for repeat in range(repeats):
                signed = torch.where((bits >> repeat) & 1 == 0, chunk, -chunk)
                folded = torch.nn.functional.pad(signed, (0, padding)).view(-1, WIDTH)
                rows.append(folded.sum(dim=0, dtype=torch.float64))
            added = torch.stack(rows).roll((first + start) % WIDTH, dims=1)
            total = added if total is None else total + added
        first += len(flat)
    return torch.zeros(repeats, WIDTH, dtype=torch.float64) if total is None else total


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent estimates; None for fewer than two."""
    if len(values) < 2:
        return None
    return float(torch.tensor(values, dtype=torch.float64).std() / math.sqrt(len(values)))
