"""Shared set-up. Without a CUDA device Triton runs through its interpreter, to be chosen before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from interpreter import patch_once_a_launch  # noqa: E402  (imports Triton)

patch_once_a_launch()

#: Drawn examples are the same in every run, and few.
settings.register_profile("repeatable", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

#: Tests against the oracle, on ``problems.DEVICE``: where that is a GPU, ``-m gpu`` selects them as well.
EXACTNESS = ("test_loss_*.py", "test_divergence*.py", "test_policy_term.py", "test_integration_torch.py")


@pytest.hookimpl(tryfirst=True)  # before ``-m`` looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if CUDA and any(item.path.match(pattern) for pattern in EXACTNESS):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every row backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param
