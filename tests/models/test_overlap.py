"""The overlap of likeliest tokens against whole logits, in blocks of any size."""

from __future__ import annotations

import pytest
import torch

from vgs.models.heads import Head
from vgs.models.overlap import top_k_overlap


def heads(columns: tuple[int, int]) -> tuple[torch.Tensor, Head, torch.Tensor, Head]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    own = Head(draw(columns[0], 8), None, 1.0, None)
    other = Head(draw(columns[1], 12), draw(columns[1]), 0.5, 2.0)
    return draw(7, 8), own, draw(7, 12), other


@pytest.mark.parametrize("workspace", [1, 16 * 7 * 13, 2**20])
@pytest.mark.parametrize(("k", "vocab_size"), [(1, None), (5, None), (20, 40), (40, 40)])
def test_blocks_say_what_whole_logits_say(k: int, vocab_size: int | None, workspace: int) -> None:
    rows, own, others, other = heads((50, 60))
    total = vocab_size or 50
    best = [head.logits(x)[:, :total].topk(k).indices for head, x in ((own, rows), (other, others))]
    expected = [len(set(a.tolist()) & set(b.tolist())) / k for a, b in zip(*best, strict=True)]
    found = top_k_overlap(rows, own, others, other, k, vocab_size, workspace)
    assert found.tolist() == pytest.approx(expected)
    assert k == total or 0 < found.mean() < 1 or k == 1


def test_a_model_agrees_with_itself_and_no_token_is_no_error() -> None:
    rows, own, _, _ = heads((50, 60))
    assert top_k_overlap(rows, own, rows, own, 9, None, 1).tolist() == [1.0] * 7
    assert top_k_overlap(rows[:0], own, rows[:0], own, 9, None, 1).shape == (0,)


def test_no_block_is_larger_than_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = Head.logits

    def logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(head.weight) * len(hidden) * 16)
        return original(head, hidden)

    monkeypatch.setattr(Head, "logits", logits)
    rows, own, others, other = heads((50, 60))
    top_k_overlap(rows, own, others, other, 3, None, 16 * 7 * 10)
    assert max(seen) <= 16 * 7 * 10 and len(seen) == 10
