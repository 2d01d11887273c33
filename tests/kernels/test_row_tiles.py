"""Tiles that are larger than a block in either direction, and rows that lie further apart than 2^31 logits."""

from __future__ import annotations

import mmap

import pytest
import torch
from allocations import AllocationMeter
from tiles import make_tile

from vgs_kernels.divergence import Divergence
from vgs_kernels.rows import entries_torch, entries_triton, layout, rows_torch, rows_triton
from vgs_kernels.rows.layout import LogitTransform, RowCoefficients, RowTile, new_state


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_the_torch_rows(monkeypatch, masked):
    """A tile in blocks of 16 x 64, the sampled columns in any of them, equals the same tile in one block."""
    n, columns = 40, 300
    torch.manual_seed(n)
    tile = make_tile(n, columns, dtype=torch.float64, masked=masked, softcap=9.0)
    chosen = torch.randint(columns, (n,))
    scalars = torch.rand(3, n, dtype=torch.float64)
    coefficients = RowCoefficients(*scalars[:2], None, True, scalars[2], chosen)
    results = []
    for small in (False, True):
        if small:
            monkeypatch.setattr(rows_torch, "_BLOCK_ROWS", 16)
            monkeypatch.setattr(rows_torch, "_BLOCK_ELEMENTS", 1)
        state = new_state(n, True, tile.student)
        rows_torch.statistics(tile, state)
        out, out_text = torch.zeros(2, n, columns, dtype=torch.float64)
        entries_torch.gradient(tile, state, None, coefficients, out, out_text)
        results.append((state, out, out_text))
    for blocks, whole in zip(*results[::-1], strict=True):
        torch.testing.assert_close(blocks, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("logits", [1, 28, 1 << 18])
def test_gated_rows_move_to_the_front(monkeypatch, logits):
    """No matter in which order they are asked for; in the tile's own memory."""
    monkeypatch.setattr(layout, "_MOVED_LOGITS", logits)
    tile, tokens = make_tile(9, 101), torch.tensor([6, 0, 2, 8])
    expected = [row[tokens].clone() for row in (tile.student_text, tile.teacher_text)]
    places = [row.data_ptr() for row in (tile.student_text, tile.teacher_text)]
    with AllocationMeter() as meter:
        pair = tile.move_text(tokens)
    assert 0 < meter.peak <= 4 * max(logits, len(tokens))
    assert torch.equal(pair.student, expected[0]) and torch.equal(pair.target, expected[1])
    assert [pair.student.data_ptr(), pair.target.data_ptr()] == places and not pair.four


@pytest.mark.skipif(not rows_triton.supports(torch.device("cpu")), reason="needs the Triton interpreter")
def test_rows_further_apart_than_32_bits_count():
    """Untouched memory costs nothing; what an overflowing offset would read is inside it, and 0."""
    half = 1 << 31  # logits of 2 bytes, before and behind the first row
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # promised to nobody
    memory = mmap.mmap(-1, 4 * half + 4096, flags=flags)
    logits = torch.frombuffer(memory, dtype=torch.bfloat16)
    n, columns, pitch = 4, 64, 715_827_904  # 3 * pitch > 2^31; a multiple of 16
    rows = [logits.as_strided((n, columns), (pitch, 1), half + 1024 + 128 * index) for index in range(2)]
    torch.manual_seed(0)
    for row in rows:
        row.copy_(3 * torch.randn(n, columns))
    states, gradients = [], []
    for student, target in (rows, [row.clone() for row in rows]):
        tile = RowTile(student, target, None, None, LogitTransform(), LogitTransform(), False, columns)
        state, out = new_state(n, False, torch.empty(0)), torch.empty(n, columns)
        rows_triton.statistics(tile, state)
        entries_triton.gradient(tile, state, Divergence(), RowCoefficients(torch.ones(n), sums=torch.ones(4, n)), out)
        states.append(state)
        gradients.append(out)
    assert torch.equal(*states) and torch.equal(*gradients)


@pytest.mark.skipif(not rows_triton.supports(torch.device("cpu")), reason="needs the Triton interpreter")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "jsd"])
def test_entries_and_tails_of_several_blocks(kind, masked):
    """Sums over three blocks, the highest logits in the second one, inside and outside of a support."""
    torch.manual_seed(0)
    n, columns = 2, 2500
    tile = make_tile(n, columns, four=False, masked=masked)
    tile.student[:, 1500:1520] += 8
    tile.target[:, 1490:1530] += 8
    divergence = Divergence(kind, beta=0.3, support="student_top_k", top_k=12)
    limit = tile.student.topk(12).values[:, -1].contiguous()
    state = new_state(n, False, torch.empty(0))
    rows_torch.statistics(tile, state)
    found = []
    for backend in (entries_torch, entries_triton):
        totals = torch.zeros(6, n)
        totals[4:] = -torch.inf
        backend.totals(tile, state, divergence, limit, totals[:4], totals[4:])
        found.append(totals)
    torch.testing.assert_close(found[1], found[0], rtol=2e-5, atol=2e-6)
