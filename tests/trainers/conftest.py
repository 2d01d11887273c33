"""Set-up of the trainers' tests."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="session", autouse=True)
def frozen_imports() -> None:
    """Every training begins with a garbage collection, which takes a quarter of a second where it looks at all objects
    of all imported libraries."""
    gc.collect()
    gc.freeze()
