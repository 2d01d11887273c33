"""Several teachers and recorded responses on two ranks: as one process does, and both ranks alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import SUPPORT, torchrun

pytestmark = pytest.mark.slow
WORKER = SUPPORT / "teacher_processes.py"


def test_two_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        torchrun(WORKER, ranks, str(tmp_path / str(ranks)))
    for name in ("recorded", "mixed", "sampled"):
        one = torch.load(tmp_path / "1" / f"{name}-0.pt", weights_only=False)
        both = [torch.load(tmp_path / "2" / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        for key, value in both[0]["weights"].items():
            assert torch.equal(value, both[1]["weights"][key]), f"{name}: {key} differs between ranks"
            if name != "mixed":  # there each process chooses among its own prompts
                torch.testing.assert_close(value, one["weights"][key], rtol=1e-4, atol=1e-6)
        for logged, expected in zip(both[0]["log"][:2], one["log"][:2], strict=True):
            if name != "mixed":
                assert logged["loss"] == pytest.approx(expected["loss"], rel=1e-4)
                assert logged["top_3_overlap"] == pytest.approx(expected["top_3_overlap"], rel=1e-4)
