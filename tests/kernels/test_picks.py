"""Logits of single columns and the scalars of tokens: Triton against PyTorch, on tiles and statistics of their own."""

import math

import pytest
import torch
from covering import pairwise
from problems import DEVICE
from tiles import make_tile

from vgs_kernels.divergence import Divergence
from vgs_kernels.policy import PolicyGradient
from vgs_kernels.rows import picks_torch, picks_triton, rows_triton
from vgs_kernels.rows.layout import new_state

pytestmark = pytest.mark.skipif(not rows_triton.supports(torch.device("cpu")), reason="needs the Triton interpreter")

#: More than a program's block of tokens.
TOKENS = 150


@pairwise(both=[True, False], four=[False, True], masked=[False, True], softcap=[None, 9.0], start=[0, 64])
def test_logits_of_columns(both, four, masked, softcap, start):
    """Those outside of the tile, on either side or by far, leave what was there."""
    torch.manual_seed(start)
    tile = make_tile(TOKENS, 100, width=128, four=four, masked=masked, softcap=softcap)
    ids = torch.randint(start - 40, start + 140, (TOKENS,), device=tile.student.device)
    ids[:2] = torch.tensor([-(2**63), 2**63 - 1])
    out = torch.randn(2 if both else 1, 2 * TOKENS, device=ids.device)[:, :TOKENS]
    expected, found = out.clone(), out.clone()
    picks_torch.pick(tile, ids, start, expected)
    picks_triton.pick(tile, ids, start, found)
    assert (expected != out).sum() > TOKENS // 4
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    outside = (ids < start) | (ids >= start + 100)
    assert outside.sum() > 10 and torch.equal(found[:, outside], out[:, outside])


def _tokens() -> dict[str, torch.Tensor]:
    """Statistics and logits of ``TOKENS`` tokens: some without support, of masked columns, and without weight."""
    torch.manual_seed(0)
    state = new_state(TOKENS, False, torch.empty(0, device=DEVICE))
    maxima, sums = 8 * torch.randn(2, TOKENS, device=DEVICE), 1 + 30 * torch.rand(2, TOKENS, device=DEVICE)
    state[0:4:2], state[1:4:2] = maxima, sums
    picked = maxima - 6 * torch.rand(2, TOKENS, device=DEVICE)
    weight, summed = torch.rand(2, TOKENS, device=DEVICE)
    state[1, 3], summed[3] = 0, math.nan
    weight[::5] = 0
    picked[0, 5:8], picked[1, 10:13] = -torch.inf, -torch.inf
    return {"state": state, "picked": picked, "weight": weight, "summed": summed}


def _policy(log_p: torch.Tensor, old: bool) -> PolicyGradient:
    advantages, weights = torch.randn(TOKENS, device=DEVICE), torch.rand(TOKENS, device=DEVICE)
    weights[::7], advantages[::11] = 0, 0
    before = (log_p + 0.4 * torch.randn(TOKENS, device=DEVICE)).nan_to_num(neginf=-20.0)
    before[7:14] = -torch.inf  # the ratio is infinite
    policy = PolicyGradient(advantages, weights, before if old else None, (0.2, 0.3), torch.float32)
    policy.prepare(torch.tensor(0.5, device=DEVICE))
    return policy


DIVERGENCES = {
    "four rows": None,
    "plain": Divergence(),
    "clipped": Divergence(token_clip=0.5),
    "sampled": Divergence("sampled_reverse_kl"),
    "sampled, clipped": Divergence("sampled_reverse_kl", token_clip=1.5),
}


@pytest.mark.parametrize("policy", [None, "on", "old"])
@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
def test_scalars_of_tokens(divergence, policy):
    """As exact as float64 arithmetic, whose result is rounded once."""
    given, slopes = _tokens(), None
    if policy is not None:
        log_p = given["picked"][0] - given["state"][0] - given["state"][1].log()
        slopes = _policy(log_p, policy == "old").slopes.at(slice(0, TOKENS))
    expected, found = (x.token_scalars(*given.values(), divergence, slopes) for x in (picks_torch, picks_triton))
    for theirs, ours in zip(expected, found, strict=True):
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=1.3e-7, atol=0, equal_nan=True)
    if divergence is not None and divergence.token_clip is not None and not divergence.sampled:
        assert found[0][3] == 0 and 0 < (found[0] == 0).sum() < TOKENS
    if divergence is not None and divergence.sampled and policy is None:
        assert not found[0].any() and not found[1][::5].any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("picks", [picks_torch, picks_triton])
def test_a_zero_weight_wins_over_an_infinite_ratio(picks, advantage):
    state = new_state(2, False, torch.empty(0, device=DEVICE))
    state[:4] = torch.tensor([0.0, 2.0, 0.0, 2.0], device=DEVICE).unsqueeze(1)
    full = torch.full((2,), advantage, device=DEVICE)
    policy = PolicyGradient(
        full, torch.tensor([0.0, 0.5], device=DEVICE), torch.tensor([-torch.inf, 0.0], device=DEVICE), (0.2, 9.0),
        torch.float32,
    )  # fmt: skip
    policy.prepare(torch.ones((), device=DEVICE))
    _, pull = picks.token_scalars(
        state, torch.zeros(1, 2, device=DEVICE), torch.ones(2, device=DEVICE), None, None, policy.slopes
    )
    counts = advantage > 0  # a ratio of 0.5, below the interval
    assert pull.tolist() == [0, -0.25 if counts else 0]
