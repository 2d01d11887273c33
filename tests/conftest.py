"""Shared set-up. Without a CUDA device Triton runs through its interpreter, to be chosen before Triton is imported."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What is found out about models and data is kept below HF_HOME: not in the developer's own.
HOME = tempfile.TemporaryDirectory(prefix="vgs-tests-")
os.environ["HF_HOME"] = HOME.name

from interpreter import patch_once_a_launch  # noqa: E402  (imports Triton)

patch_once_a_launch()

#: Drawn examples are the same in every run, and few.
settings.register_profile("repeatable", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")

#: Tests against the oracle, on ``problems.DEVICE``: where that is a GPU, ``-m gpu`` selects them as well.
EXACTNESS = (
    *("test_loss_*.py", "test_divergence*.py", "test_policy_term.py", "test_integration_torch.py"),
    "test_gated_rows.py",
)


@pytest.hookimpl(tryfirst=True)  # before ``-m`` looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CUDA:  # the loops are for CPUs
        of_cpu = {x for x in items if hasattr(x, "callspec") and x.callspec.params.get("backend") == "loops"}
        items[:] = [x for x in items if x not in of_cpu]
        config.hook.pytest_deselected(items=list(of_cpu))
    for item in items:
        if CUDA and any(item.path.match(pattern) for pattern in EXACTNESS):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(params=["torch", "loops", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every row backend."""
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``checkpoint(family, teacher=False)``: the folder of a tiny real checkpoint, saved when it is first asked for."""
    from real_checkpoints import real_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def saved(family: str, teacher: bool = False) -> Path:
        return real_checkpoint(family, folder / f"{family}_{'teacher' if teacher else 'student'}", teacher=teacher)

    return saved
