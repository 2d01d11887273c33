"""The interpreter that these tests use is Triton's own, only faster."""

import pytest
import torch
from interpreter import original_interpreter
from tiles import make_tile

from vgs_kernels.divergence import Divergence
from vgs_kernels.rows import entries_triton, rows_triton
from vgs_kernels.rows.entries_torch import SUMS, TAILS
from vgs_kernels.rows.layout import new_state

pytestmark = pytest.mark.skipif(not rows_triton.supports(torch.device("cpu")), reason="needs the Triton interpreter")


def test_same_numbers_as_without_the_shortcut():
    torch.manual_seed(0)
    tile = make_tile(2, 37, four=False, masked=True, softcap=9.0)

    def run() -> list[torch.Tensor]:
        state, sums = new_state(2, False, torch.empty(0)), torch.zeros(len(SUMS), 2)
        tails = torch.full((len(TAILS), 2), -torch.inf)
        rows_triton.statistics(tile, state)
        entries_triton.totals(tile, state, Divergence("jsd", 0.3), torch.zeros(2), sums, tails)
        return [state, sums, tails]

    quick = run()
    with original_interpreter():
        slow = run()
    for ours, theirs in zip(quick, slow, strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all() and ours.any()
