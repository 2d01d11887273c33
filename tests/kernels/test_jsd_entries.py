"""What the Triton rows take for e^x - 1 and log(1 + x), and an entry of the JSD, against float64."""

import inspect
import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from problems import DEVICE

from vgs_kernels.divergence import Divergence
from vgs_kernels.rows import entries_torch, entries_triton, entry_triton, rows_triton

pytestmark = pytest.mark.skipif(not rows_triton.supports(torch.device("cpu")), reason="needs the Triton interpreter")

_expm1, _log1p, _entry = entry_triton._expm1, entry_triton._log1p, entry_triton.entry


@triton.jit
def expm1_kernel(x_ptr, out_ptr, FAR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, _expm1(tl.load(x_ptr + at)))


@triton.jit
def log1p_kernel(x_ptr, out_ptr, FAR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, _log1p(tl.load(x_ptr + at), FAR))


@triton.jit
def entry_kernel(p_ptr, q_ptr, r_ptr, out_ptr, n, beta, KIND: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    p, q, r = tl.load(p_ptr + at), tl.load(q_ptr + at), tl.load(r_ptr + at)
    value, slope = _entry(p, q, r, beta, 0.0, KIND, False, False)
    tl.store(out_ptr + at, value)
    tl.store(out_ptr + n + at, slope)


def minimax(f: Callable[[np.ndarray], np.ndarray], least: float, degree: int) -> np.ndarray:
    """Coefficients of Q for which x + x^2 * Q(x) has the least relative error on [least, 0] (Lawson's weights)."""
    x = least * (1 - np.cos(np.linspace(0, np.pi, 2001)[1:])) / 2
    rows = x[:, None] ** (2 + np.arange(degree + 1)) / f(x)[:, None]
    wanted, weights, best = 1 - x / f(x), np.ones_like(x), (np.inf, None)
    for _ in range(300):
        roots = np.sqrt(weights)
        found = np.linalg.lstsq(rows * roots[:, None], wanted * roots, rcond=None)[0]
        error = np.abs(rows @ found - wanted)
        best = min(best, (error.max(), found), key=lambda x: x[0])
        weights = weights * error / (weights * error).sum()
    return best[1]


@pytest.mark.parametrize(
    ("function", "exact", "least", "degree"), [(_expm1, np.expm1, -0.8, 4), (_log1p, np.log1p, -0.5, 7)]
)
def test_where_the_coefficients_come_from(function, exact, least, degree):
    source = inspect.getsource(function.fn)
    there = sorted(float(x) for x in re.findall(r"-?\b\d+\.\d{5,}\b", source))
    np.testing.assert_allclose(there, sorted(minimax(exact, least, degree)), rtol=1e-6)


#: Of either sign of exponent, down to the smallest normal number.
SMALL = -np.logspace(-37.9, -1, 20_000)


@pytest.mark.parametrize(
    ("kernel", "exact", "x", "far"),
    [
        (expm1_kernel, np.expm1, np.concatenate([SMALL, -np.linspace(0.1, 100, 40_000)]), True),
        (log1p_kernel, np.log1p, np.concatenate([SMALL, -np.linspace(0.1, 0.5, 40_000)]), False),
        (log1p_kernel, np.log1p, np.concatenate([SMALL, -np.linspace(0.1, 1 - 2**-23, 40_000)]), True),
        (log1p_kernel, np.log1p, -1 + np.logspace(-7, -1, 20_000), True),
    ],
    ids=["expm1", "log1p near 0", "log1p", "log1p near -1"],
)
def test_relative_error(kernel, exact, x, far):
    given = torch.from_numpy(x.astype(np.float32))
    given = torch.nn.functional.pad(given, (0, -len(given) % 1024)).to(DEVICE)
    found = torch.empty_like(given)
    kernel[(len(given) // 1024,)](given, found, FAR=far, BLOCK=1024)
    given, found = given.double().cpu().numpy(), found.double().cpu().numpy()
    wanted = exact(given)
    assert not found[wanted == 0].any()
    error = np.abs(found - wanted)[wanted != 0] / np.abs(wanted[wanted != 0])
    assert error.max() < 2e-7


@pytest.mark.parametrize("beta", [1e-3, 0.3, 0.5, 0.999])
@pytest.mark.parametrize("sign", [1, -1])
def test_entries(beta, sign):
    """As exact as PyTorch's own functions in float32, over each decade of the log-ratio. A kernel's beta is float32."""
    beta, edges = float(np.float32(beta)), 10.0 ** np.arange(-30, 3)
    divergence = Divergence("jsd", beta=beta)
    r = torch.from_numpy(sign * np.logspace(-30, 2, 32 * 1024)).float()
    p = torch.from_numpy(0.1 * np.exp(np.minimum(r.double().numpy(), 0))).float()
    q = torch.from_numpy(0.1 * np.exp(-np.maximum(r.double().numpy(), 0))).float()
    out, given = torch.empty(2, len(r), device=DEVICE), [x.to(DEVICE) for x in (p, q, r)]
    _, options = entries_triton._options(divergence, None)
    entry_kernel[(32,)](*given, out, len(r), beta, KIND=options["KIND"], BLOCK=1024)
    exact = torch.stack(entries_torch.entry(p.double(), q.double(), r.double(), divergence))
    theirs = torch.stack(entries_torch.entry(p.clone(), q.clone(), r.clone(), divergence))
    size = torch.stack([beta * q.double() * r.abs() + exact[1].abs(), exact[1].abs()])
    for low, high in itertools.pairwise(edges):
        here = (r.abs() >= low) & (r.abs() < high) & (p > 1e-30) & (q > 1e-30)
        for row in range(2):
            errors = [((x[row].cpu().double() - exact[row]).abs() / size[row])[here] for x in (out, theirs)]
            ours, best = (float(x.max()) if len(x) else 0.0 for x in errors)
            assert ours <= 1.5 * best + 4e-7, (low, row)
