"""One call of the fused VGS loss against the oracle, and what its tests share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import vgs_oracle
from problems import (
    DEVICE,
    FAR,
    NEAR,
    Problem,
    assert_gradients_close,
    assert_terms_close,
    evaluate,
    float32_bars,
    value_floor,
)

from vgs_kernels import fused_linear_vgs_loss

#: Tokens and vocabulary by backend: neither is a multiple of any block; the interpreter gets few tokens.
SIZES = [
    pytest.param({"torch": (65, 257), "loops": (65, 257), "triton": (7, 257)}, id="short rows"),
    pytest.param({"torch": (7, 4099), "loops": (7, 4099), "triton": (3, 4099)}, id="long rows"),
    pytest.param({"torch": (1, 1000), "loops": (1, 1000), "triton": (1, 1000)}, id="one token"),
]
GAPS = [pytest.param(FAR, id="far"), pytest.param(0.1, id="near"), pytest.param(NEAR, id="nearer")]


def weights(problem: Problem) -> torch.Tensor:
    """Unequal weights, a third of them zero, one negative (policy-gradient users have those)."""
    values = torch.linspace(0.1, 2.0, problem.tokens, device=DEVICE)
    values[::3] = 0
    values[1] = -0.5
    return values


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as every second column of a wider tensor."""
    wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def compare(
    problem: Problem, options: dict[str, Any], *, floor: Callable[..., float] = value_floor, **kernel: Any
) -> None:
    """Values and gradients of the fused loss against the oracle in float64, as close as the problem's dtype allows.

    ``floor`` gives the absolute error of float32 values: of a problem and a temperature.
    """
    double = problem.student_hidden.dtype == torch.float64
    rtol, atol = (1e-9, 1e-11) if double else (1e-5, floor(problem, options["objective"].temperature))
    options = {"target_ids": problem.target_ids, **options}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    ours = evaluate(fused_linear_vgs_loss, problem, **kernel, **options)
    assert_terms_close(ours.output, exact.output, rtol=rtol, floor=atol)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=rtol, atol=10 * atol)
    assert_gradients_close(ours, exact, rtol=rtol if double else float32_bars(problem, exact, vgs_oracle, **options))
