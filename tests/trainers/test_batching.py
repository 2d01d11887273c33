"""Bin packing of responses into passes, and cutting groups by response."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vgs.models.groups import PromptGroup, select_responses
from vgs.trainers.batching import plan_passes


def group(prompt: int, text: int, lengths: list[int]) -> PromptGroup:
    responses = tuple(torch.arange(length) for length in lengths)
    return PromptGroup(torch.arange(prompt), torch.arange(text), responses, {})


GROUPS = st.lists(
    st.builds(group, st.integers(1, 40), st.integers(1, 20), st.lists(st.integers(1, 30), min_size=1, max_size=5)),
    min_size=1,
    max_size=6,
)


@given(GROUPS, st.integers(120, 400), st.booleans(), st.booleans())
def test_every_response_once_and_no_pass_over_budget(groups, budget: int, text: bool, share: bool) -> None:
    passes = plan_passes(groups, budget, text=text, share_prefix=share)
    count = sum(len(x.responses) for x in groups)
    assert sorted(number for chosen in passes for number in chosen) == list(range(count))
    for chosen in passes:
        assert chosen == sorted(chosen)
        kept = select_responses(groups, chosen)
        parts = kept if share else [alone for x in kept for alone in x.alone()]
        assert sum(part.tokens(text) for part in parts) <= budget


def test_responses_stay_with_their_prompt_and_bins_are_filled() -> None:
    groups = [group(10, 5, [5, 5]), group(30, 5, [5]), group(10, 5, [5])]  # 35, 45 and 25 tokens
    assert plan_passes(groups, 70) == [[2, 3], [0, 1]]
    assert plan_passes(groups, 105) == [[0, 1, 2, 3]]
    assert plan_passes(groups, None) == [[0, 1, 2, 3]]
    # 25 tokens a response: the first prompt's two no longer fit together.
    assert sorted(map(len, plan_passes(groups, 45))) == [1, 1, 2]


def test_one_view_needs_fewer_tokens() -> None:
    assert plan_passes([group(10, 5, [5]), group(10, 5, [5])], 30, text=False) == [[0, 1]]


def test_a_response_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="A response of 20 tokens needs 55 tokens with its prompt in both views, more"):
        plan_passes([group(5, 5, [5]), group(10, 5, [20])], 54)


def test_selected_responses_keep_their_groups() -> None:
    groups = [group(3, 2, [1, 2, 3]), group(4, 2, [4]), group(5, 2, [5, 6])]
    kept = select_responses(groups, [0, 2, 4])
    assert [(len(x.prompt_ids), x.response_lengths) for x in kept] == [(3, [1, 3]), (5, [5])]
    assert select_responses(groups, []) == []
