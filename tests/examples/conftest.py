"""What all examples are run on."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_runs import Recorder, make_workplace

import vgs


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See ``make_workplace``."""
    return make_workplace(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def inside(workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The test runs in a folder of its own that shows all of the workplace."""
    for path in workplace.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Takes the place of ``vgs_step`` in examples that are run."""
    monkeypatch.setattr(vgs, "vgs_step", found := Recorder())
    return found
