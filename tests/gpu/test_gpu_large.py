"""More than 2^31 logits: 64-bit offsets."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import LIVE, VOCAB, dense, logit_floor, repeated, rising_weights
from oracle import vgs_from_logits, vgs_oracle
from problems import DEVICE, TERMS, Problem, assert_terms_close, evaluate, float32_bars, relative_error
from torch import Tensor

from vgs_kernels import fused_linear_vgs_loss, vgs_loss

pytestmark = pytest.mark.gpu


MEMORY_LIMIT = 60 * 2**30


def threshold(vds: Tensor) -> float:
    """About the median, and far from every score: the gate is the same in float32."""
    middle = vds.double().sort().values[len(vds) // 3 : -(len(vds) // 3)]
    at = int(middle.diff().argmax())
    return middle[at : at + 2].mean().item()


def total_weights(weights: Tensor, period: int) -> Tensor:
    """Weight of each distinct token: the sum over its repetitions."""
    index = torch.arange(len(weights), device=weights.device) % period
    return torch.zeros(period, dtype=torch.float64, device=weights.device).index_add_(0, index, weights.double())


def assert_repeated_terms(actual: Any, exact: Any, tokens: int, floor: float) -> None:
    index = torch.arange(tokens, device=DEVICE) % len(exact.vds)
    values = {name: getattr(exact, name) for name in (*TERMS, "gate")}
    expected = {name: None if value is None else value[index] for name, value in values.items()}
    assert_terms_close(actual, SimpleNamespace(**expected), rtol=1e-5, floor=floor)


def repetitions(gradient: Tensor, exact: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, what the oracle wants there) for one period after the other; ``exact`` is for the total weights."""
    unit = exact.double() / total_weights(weights, len(exact))[:, None]
    for start in range(0, len(gradient), len(exact)):
        rows = gradient[start : start + len(exact)].double()
        yield rows, unit[: len(rows)] * weights[start : start + len(exact), None]


def check_large_logits(problem: Problem, tokens: int, dtype: torch.dtype) -> None:
    """``vgs_loss`` on the repeated logits of ``problem``: all terms and all rows of both gradients."""
    few = [row.to(dtype) for row in dense(problem)]
    weights = rising_weights(tokens)
    options: dict[str, Any] = {"objective": LIVE, "target_ids": problem.target_ids}
    exact_rows = [row.double().requires_grad_(i < 2) for i, row in enumerate(few)]
    options["vds_threshold"] = threshold(vgs_from_logits(*exact_rows, **options).vds)
    exact = vgs_from_logits(*exact_rows, token_weights=total_weights(weights, problem.tokens), **options)
    exact.loss.backward()
    assert 0 < exact.gate.sum() < len(exact.gate)

    index = torch.arange(tokens, device=DEVICE) % problem.tokens
    leaves = [row[index].requires_grad_(i < 2) for i, row in enumerate(few)]
    options["target_ids"] = problem.target_ids[index]
    ours = vgs_loss(*leaves, token_weights=weights, **options)
    ours.loss.backward()
    floor = logit_floor(problem)
    torch.testing.assert_close(ours.loss.detach().double(), exact.loss.detach(), rtol=1e-5, atol=10 * floor)
    assert_repeated_terms(ours, exact, tokens, floor)
    for leaf, reference in zip(leaves[:2], exact_rows[:2], strict=True):
        assert leaf.grad.dtype == dtype
        for part, (rows, wanted) in enumerate(repetitions(leaf.grad, reference.grad, weights)):
            error = (rows - wanted).norm(dim=1)
            # stored and scaled in 16 bits: two roundings of half an eps each
            wrong = error > 1.1 * torch.finfo(dtype).eps * wanted.norm(dim=1)
            assert not wrong.any(), (part, wrong.nonzero().flatten().tolist())


def check_large_fused(problem: Problem, tokens: int, dtype: torch.dtype, **kernel: Any) -> None:
    """``fused_linear_vgs_loss`` on the repeated tokens of ``problem``: terms, gradients of all rows and of the head."""
    problem = problem.to(dtype=dtype)
    weights = rising_weights(tokens)
    options: dict[str, Any] = {"objective": LIVE, "target_ids": problem.target_ids}
    scores = evaluate(vgs_oracle, problem, dtype=torch.float64, requires_grad=(), **options).output.vds
    options["vds_threshold"] = threshold(scores)
    total = {"token_weights": total_weights(weights, problem.tokens)}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **total, **options)
    assert 0 < exact.output.gate.sum() < problem.tokens
    if dtype == torch.float32:
        bars = float32_bars(problem, exact, vgs_oracle, **total, **options)
    else:
        eager = evaluate(vgs_oracle, problem, vds=scores, **total, **options)
        bars = {key: 2 * relative_error(value, exact.gradients[key]) for key, value in eager.gradients.items()}

    many = repeated(problem, tokens)
    options["target_ids"] = many.target_ids
    ours = evaluate(fused_linear_vgs_loss, many, token_weights=weights, **options, **kernel)
    floor = logit_floor(problem)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=10 * floor)
    assert_repeated_terms(ours.output, exact.output, tokens, floor)
    for name in ("student_hidden", "student_text_hidden"):
        for part, (rows, wanted) in enumerate(repetitions(ours.gradients[name], exact.gradients[name], weights)):
            error = relative_error(rows, wanted)
            if len(rows) == problem.tokens:  # the bars are averages over that many
                assert error <= bars[name], f"{name}, repetition {part}: {error:.2e}, allowed {bars[name]:.2e}"
            else:
                assert error <= 4 * bars[name], f"{name}, last rows: {error:.2e}, allowed 4 * {bars[name]:.2e}"
    error = relative_error(ours.gradients["student_weight"], exact.gradients["student_weight"])
    assert error <= bars["student_weight"], f"{error:.2e}, allowed {bars['student_weight']:.2e}"


@pytest.mark.slow
def test_logits_beyond_2_31_elements(narrow):
    tokens = 14_200
    assert tokens * VOCAB > 2**31
    torch.cuda.reset_peak_memory_stats()
    check_large_logits(narrow, tokens, torch.bfloat16)
    assert torch.cuda.max_memory_allocated() < MEMORY_LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        pytest.param(torch.bfloat16, {}, id="bfloat16"),
        # all tokens in one tile: the offsets inside a slab pass 2^31
        pytest.param(torch.float32, {"workspace_bytes": 40 * 2**30}, id="float32-one-tile"),
    ],
)
def test_fused_beyond_2_31_elements(narrow, dtype, kernel):
    tokens = 16_384
    assert tokens * VOCAB > 2**31
    torch.cuda.reset_peak_memory_stats()
    check_large_fused(narrow, tokens, dtype, **kernel)
    assert torch.cuda.max_memory_allocated() < MEMORY_LIMIT
