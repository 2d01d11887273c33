"""The tests run on what they are meant to run on: a missing or another version must fail, not pass as a skip."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The file that ``make`` installed from; without it, any versions will do.
CONSTRAINTS = os.environ.get("CONSTRAINTS")


def pinned(path: Path) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    pins = dict(line.split("==") for line in lines if line)
    return pins if sys.platform == "linux" else {name: x for name, x in pins.items() if name != "triton"}


def installed(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def test_torchvision_is_there() -> None:
    """Without it the image processors of real families fall back to others, and tests of them would be skipped."""
    import torchvision

    assert torchvision.__version__


@pytest.mark.skipif(CONSTRAINTS is None, reason="not an environment of make")
def test_versions_are_the_pinned_ones() -> None:
    pins = pinned(ROOT / CONSTRAINTS)
    assert {"torch", "torchvision", "transformers", "trl"} <= set(pins)
    assert {name: installed(name) for name in pins} == pins


def test_no_two_test_files_share_a_name() -> None:
    """The folders of tests are no packages: pytest refuses the second file of a name, but only in a run of all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_both_sets_pin_the_same_packages() -> None:
    newest, oldest = (pinned(ROOT / name) for name in ("constraints.txt", "constraints-oldest.txt"))
    assert set(newest) - set(oldest) == {"ruff", "mypy"} and not set(oldest) - set(newest)
