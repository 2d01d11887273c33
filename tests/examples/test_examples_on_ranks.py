"""The accelerate example on two ranks: one process on the joined batches takes the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from example_runs import assert_same_weights, make_workplace, one_step
from launch import SUPPORT, torchrun
from transformers import AutoModelForImageTextToText

ENGINES = {"ddp": "DistributedDataParallel", "fsdp": "FSDPQwen3VLForConditionalGeneration"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both engines ran, in one launch."""
    found = make_workplace(tmp_path_factory.mktemp("ranks"))
    torchrun(SUPPORT / "example_processes.py", 2, str(found), *ENGINES, timeout=500)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_ranks_are_one_process(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    reports: list[dict[str, Any]] = [torch.load(f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]
    assert [report["wrapper"] for report in reports] == [ENGINES[name]] * 2
    for key, value in reports[0]["weights"].items():
        assert torch.equal(value, reports[1]["weights"][key]), f"replicas differ in {key}"
    assert [len(report["calls"]) for report in reports] == [4, 4]
    steps = []
    for first in (0, 2):
        calls = [call for report in reports for call in report["calls"][first : first + 2]]
        steps.append(tuple([x for call in calls for x in call[part]] for part in range(2)))
    assert all(len(samples) == 8 for samples, _ in steps)
    answers = [[tuple(x) for answers in report["calls"][0][1] for x in answers] for report in reports]
    assert answers[0] != answers[1], "ranks sample the same answers"
    losses, expected = one_step(steps, 0.05, clip=1.0)
    means = torch.tensor([report["losses"] for report in reports]).view(2, 2, 2).mean(dim=(0, 2))
    assert means.tolist() == pytest.approx(losses, rel=1e-5)
    assert_same_weights(reports[0]["weights"], expected)
    saved = AutoModelForImageTextToText.from_pretrained(f"runs/{name}").state_dict()
    assert_same_weights(saved, expected)
