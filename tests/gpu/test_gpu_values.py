"""Values and gradients of compiled kernels at larger sizes, against the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import OBJECTIVES, assert_bitwise, logit_floor
from loss_checks import compare
from oracle import vgs_oracle
from problems import (
    DEVICE,
    TERMS,
    Evaluation,
    assert_gradients_close,
    assert_terms_close,
    evaluate,
    float32_bars,
    relative_error,
)
from torch import Tensor

from vgs_kernels import fused_linear_vgs_loss

pytestmark = pytest.mark.gpu


HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_float32_against_the_oracle(wide, name):
    compare(wide.to(dtype=torch.float32), {"objective": OBJECTIVES[name]}, floor=logit_floor, backend="triton")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_against_the_oracle(wide, dtype, name):
    """No worse than twice plain PyTorch on the same 16-bit inputs, as in test_loss_half.py."""
    problem = wide.to(dtype=dtype)
    options = {"objective": OBJECTIVES[name], "target_ids": problem.target_ids}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    eager = evaluate(vgs_oracle, problem, vds=exact.output.vds, **options)  # with the exact gate
    ours = evaluate(fused_linear_vgs_loss, problem, backend="triton", **options)

    bars = {key: 2 * relative_error(gradient, exact.gradients[key]) for key, gradient in eager.gradients.items()}
    assert_gradients_close(ours, exact, rtol=bars)
    assert {gradient.dtype for gradient in ours.gradients.values()} == {dtype}
    floor = logit_floor(problem) / exact.loss.item()
    for term in set(TERMS) - {"vds"}:
        expected = getattr(exact.output, term)
        bar = max(2 * relative_error(getattr(eager.output, term), expected), floor)
        assert relative_error(getattr(ours.output, term), expected) <= bar, term
    assert torch.equal(ours.output.gate, exact.output.gate)
    assert relative_error(ours.output.vds, exact.output.vds) < 1e-4
    assert relative_error(ours.loss, exact.loss) <= max(2 * relative_error(eager.loss, exact.loss), floor)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cut_vocabulary_equals_the_whole(far, dtype, name):
    """A workspace that holds neither all columns nor all tokens; both ways are within their bars of the oracle."""
    problem = far.to(dtype=dtype)
    options = {"objective": OBJECTIVES[name], "target_ids": problem.target_ids}
    whole = evaluate(fused_linear_vgs_loss, problem, **options)
    cut = evaluate(fused_linear_vgs_loss, problem, workspace_bytes=2**22, **options)
    floor = 2 * logit_floor(problem)
    assert_terms_close(cut.output, whole.output, rtol=2e-5, floor=floor)
    torch.testing.assert_close(cut.loss, whole.loss, rtol=2e-5, atol=10 * floor)
    if dtype == torch.float32:
        exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
        bars = {key: 2 * bar for key, bar in float32_bars(problem, exact, vgs_oracle, **options).items()}
        assert_gradients_close(cut, whole, rtol=bars)
    else:  # rounded to 16 bits twice: as gradients of logits and at the end
        assert_gradients_close(cut, whole, rtol=2 * torch.finfo(dtype).eps)


def test_autocast_equals_an_explicit_cast(odd):
    """Gradients of float32 parameters are those of the cast inputs before the last rounding."""
    problem = odd.to(dtype=torch.float32)

    def automatic(*args: Tensor, **options: Any) -> Any:
        with torch.autocast(DEVICE, torch.bfloat16):
            return fused_linear_vgs_loss(*args, **options)

    options = {"objective": OBJECTIVES["live prior"], "target_ids": problem.target_ids}
    ours = evaluate(automatic, problem, **options)
    assert {gradient.dtype for gradient in ours.gradients.values()} == {torch.float32}
    explicit = evaluate(fused_linear_vgs_loss, problem.to(dtype=torch.bfloat16), **options)
    assert any(not torch.equal(ours.gradients[key], value.float()) for key, value in explicit.gradients.items())
    rounded = {key: gradient.to(torch.bfloat16) for key, gradient in ours.gradients.items()}
    assert_bitwise(Evaluation(ours.output, rounded), explicit)
