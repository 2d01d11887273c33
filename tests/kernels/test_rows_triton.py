"""The Triton rows against the PyTorch rows on tiles of their own: splits, pitched and unaligned rows, masks."""

import pytest
import torch
from covering import pairwise
from tiles import make_tile

from vgs_kernels.divergence import Divergence
from vgs_kernels.rows import entries_torch, entries_triton, rows_torch, rows_triton, triton_common
from vgs_kernels.rows.layout import RowCoefficients, new_state

pytestmark = pytest.mark.skipif(not rows_triton.supports(torch.device("cpu")), reason="needs the Triton interpreter")


@pytest.fixture
def splits(monkeypatch):
    """Several splits a row, the last one shorter."""
    monkeypatch.setattr(triton_common, "_MIN_SPLIT_BLOCKS", 1)
    monkeypatch.setattr(triton_common, "multiprocessors", lambda device: 2)


#: Columns, pitch and dtype: one or several splits, aligned or not, with and without room behind the last column.
LAYOUTS = [
    pytest.param((5000, None, torch.float32), id="aligned"),
    pytest.param((5001, 5056, torch.float32), id="pitched"),
    pytest.param((4999, None, torch.bfloat16), id="unaligned-bfloat16"),
    pytest.param((5000, 5056, torch.bfloat16), id="pitched-bfloat16"),
    pytest.param((37, 64, torch.float32), id="short"),
]


@pairwise(layout=LAYOUTS, four=[True, False], masked=[False, True], softcap=[None, 9.0])
def test_statistics_and_gradient_of_a_tile(splits, layout, four, masked, softcap):
    columns, width, dtype = layout
    torch.manual_seed(columns)
    n = 3
    tile = make_tile(n, columns, width=width, dtype=dtype, four=four, masked=masked, softcap=softcap)
    earlier = make_tile(n, 40, dtype=dtype, four=four, masked=masked, softcap=softcap)
    states = []
    for backend in (rows_torch, rows_triton):
        state = new_state(n, four, torch.empty(0))
        for x in (earlier, tile):
            backend.statistics(x, state)
        states.append(state)
    torch.testing.assert_close(states[1], states[0], rtol=2e-5, atol=2e-6)

    for prior in (False, True) if four else ():
        coefficients = RowCoefficients(*torch.rand(2, n), live_prior=prior)
        whole = torch.full((2, 2, n, width or columns), torch.nan)
        for backend, gradients in zip((entries_torch, entries_triton), whole, strict=True):
            out, out_text = gradients[..., :columns]
            backend.gradient(tile, states[0], None, coefficients, out, out_text if prior else None)
        for got, wanted in zip(whole[1, :, :, :columns], whole[0, :, :, :columns], strict=True):
            written = ~wanted.isnan()
            assert torch.equal(written, ~got.isnan())
            assert (got - wanted)[written].norm() <= 1e-5 * wanted[written].norm()
        assert (~whole[1, 1, :, 0].isnan()).sum() == (n if prior else 0)
        # Up to the next multiple of 16 zeros, if there is room for them; nothing behind that.
        tokens = torch.tensor([[True] * n, [not whole[1, 1, row, 0].isnan() for row in range(n)]])
        behind = whole[1, :, :, columns:][tokens]
        zeros = -columns % 16 if width else 0
        assert bool((behind[:, :zeros] == 0).all()) and bool(behind[:, zeros:].isnan().all())


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_a_kl_follows_from_its_statistics_where_that_is_exact(splits, kind):
    """Not of rows that nearly agree, nor of a certain student."""
    torch.manual_seed(0)
    tile, divergence = make_tile(4, 5000, four=False), Divergence(kind)
    tile = tile._replace(target_transform=tile.student_transform)
    tile.target[0] = tile.student[0] + 1e-3 * torch.randn(5000)
    tile.student[1, 3000] += 60
    state, found = new_state(4, False, torch.empty(0)), torch.zeros(2, 4, 4)
    rows_torch.statistics(tile, state)
    entries_torch.totals(tile, state, divergence, None, found[0], None)
    entries_triton.totals(tile, state, divergence, None, found[1], None, above=0.01)
    torch.testing.assert_close(found[1][:, :2], found[0][:, :2], rtol=2e-5, atol=2e-6)
    assert found[1][2].tolist() == [pytest.approx(1, rel=1e-5), pytest.approx(0, abs=1e-9), 0, 0]
    specified, ours = ((x[0], RowCoefficients(torch.ones(4), sums=x).centre(state)[0]) for x in found)
    torch.testing.assert_close(ours, specified, rtol=2e-5, atol=2e-6)


def test_splits_share_a_row_among_multiprocessors():
    for n_rows in (1, 33, 192, 5000):
        for n_blocks in (1, 7, 16, 149):
            count, blocks = triton_common.splits(n_rows, n_blocks, 132)
            assert (count - 1) * blocks < n_blocks <= count * blocks  # none is empty, all are covered
            assert count == 1 or blocks >= triton_common._MIN_SPLIT_BLOCKS
    assert triton_common.splits(192, 149, 132)[0] * 192 >= 4 * 132


def test_unaligned_rows_are_recognised():
    assert triton_common._aligned([torch.empty(3, 64)], 64)
    assert not triton_common._aligned([torch.empty(3, 65)], 65)
    assert not triton_common._aligned([torch.empty(3 * 64 + 1)[1:].view(3, 64)], 64)
