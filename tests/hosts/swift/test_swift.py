"""ms-swift's whole trainer with VGS: three steps, its own encodings, and the mean over accumulated micro-batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from swift_run import CASES, ROOT, STEPS
from tiny import SPECIAL

Measured = Callable[[str, float], float]
WORKER = Path(__file__).parent / "swift_run.py"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("swift")


def launch(folder: Path, case: str, **variables: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **variables}
    command = [sys.executable, str(WORKER), str(folder), case]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="session")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for case in CASES:
        done = launch(folder, case)
        assert done.returncode == 0, done.stderr[-6000:]
        found[case] = torch.load(folder / f"{case}.pt", weights_only=False)
    return found


def steps(run: dict[str, Any]) -> list[dict[str, float]]:
    return [entry for entry in run["log"] if "loss" in entry]


@pytest.mark.parametrize("case", CASES)
def test_three_steps_are_trained_and_logged(runs: Any, case: str) -> None:
    assert runs[case]["trainer"] == "VGSTrainer"
    entries = steps(runs[case])
    assert len(entries) == STEPS
    for entry in entries:
        assert entry["loss"] > 0 and entry["grad_norm"] > 0
        assert {"vgs/standard", "vgs/visual", "vgs/language", "vgs/vds", "vgs/gate"} <= set(entry)


@pytest.mark.parametrize("case", CASES)
def test_packed_states_are_those_of_swifts_encodings(runs: Any, measured: Measured, case: str) -> None:
    gaps = runs[case]["gaps"]
    assert set(gaps) == {"student image", "student text", "teacher image", "teacher text"}
    assert measured("of the largest hidden state, packed against padded", max(gaps.values())) < 1e-5


def test_no_image_token_is_sampled(runs: Any) -> None:
    marks = {SPECIAL.index(token) for token in SPECIAL if "pad|>" in token or "vision" in token}
    sampled = runs["sampled"]["responses"]
    assert len(sampled) >= 12 and len({tuple(ids) for ids in sampled}) > 3
    assert not marks & {token for ids in sampled for token in ids}


def test_accumulated_micro_batches_are_one_batch(runs: Any, measured: Measured) -> None:
    """Responses have one to four words: a mean of the micro-batches' means would differ, and so would their gates."""
    split, whole = runs["split"], runs["whole"]
    for one, other in zip(steps(split), steps(whole), strict=True):
        for name, bound in (("loss", 1e-5), ("grad_norm", 1e-4)):
            difference = abs(one[name] - other[name]) / other[name]
            assert measured(f"of {name}, two micro-batches against one", difference) < bound
    for name, weight in whole["weights"].items():
        assert (split["weights"][name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name


def test_an_option_of_another_host_is_refused(folder: Path) -> None:
    done = launch(folder, "whole", VGS_TEST_OPTIONS='{"policy_coefficient": 0.5}')
    assert done.returncode != 0
    assert "policy_coefficient must be left out with swift" in done.stderr


def test_a_teacher_of_other_tokens_is_refused(folder: Path) -> None:
    done = launch(folder, "whole", VGS_TEST_TEACHER="other_tokens")
    assert done.returncode != 0
    assert "student and teacher must have the same tokens, but 2 ids differ (student's, teacher's): " in done.stderr
