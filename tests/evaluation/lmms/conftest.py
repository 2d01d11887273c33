"""These tests need lmms-eval, which has an environment of its own (``make test-eval``); elsewhere none is collected.

Nothing is fetched: the datasets are synthetic rows in the form of the real ones, in folders named as on the hub.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

collect_ignore_glob = ["test_*.py"]
if importlib.util.find_spec("lmms_eval"):
    collect_ignore_glob = []
    HOME = tempfile.TemporaryDirectory(prefix="vgs-eval-")
    os.environ |= {"HF_HOME": HOME.name, "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def datasets_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``load_dataset`` finds the seven datasets by their names."""
    from benchmark_rows import write_datasets

    folder = tmp_path_factory.mktemp("hub")
    write_datasets(folder)
    return folder


@pytest.fixture(autouse=True)
def in_datasets_folder(datasets_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(datasets_folder)
