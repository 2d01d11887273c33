"""Fixtures of the tests that need a GPU, which are skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from device import ODD_VOCAB, PERIOD, TOKENS, VOCAB, realistic
from problems import FAR, NEAR, Problem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    """The bars of float32 are those of float32 products."""
    assert torch.backends.cuda.matmul.allow_tf32 is False


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((vocab, gap), id=f"{vocab}-{name}")
        for vocab in (ODD_VOCAB, VOCAB)
        for name, gap in (("far", FAR), ("near", NEAR))
    ],
)
def wide(request: pytest.FixtureRequest) -> Problem:
    """A float64 problem of real hidden sizes, an odd and an aligned vocabulary; one at a time in memory."""
    vocab, gap = request.param
    return realistic(TOKENS, vocab, 512, 1024, gap=gap)


@pytest.fixture(scope="module", params=[ODD_VOCAB, VOCAB])
def far(request: pytest.FixtureRequest) -> Problem:
    """For tests of behaviour that the values have no part in."""
    return realistic(TOKENS, request.param, 64, 128)


@pytest.fixture(scope="module")
def odd() -> Problem:
    return realistic(TOKENS, ODD_VOCAB, 64, 128)


@pytest.fixture(scope="module")
def narrow() -> Problem:
    """Few and short rows, of which the large problems consist."""
    return realistic(PERIOD, VOCAB, 64, 128)
