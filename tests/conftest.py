"""Shared set-up. Without a CUDA device Triton runs through its interpreter, to be chosen before Triton is imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every row backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param
