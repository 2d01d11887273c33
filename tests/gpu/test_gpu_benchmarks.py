"""The benchmark suite on a real device, at a small size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import loss, methods
from benchmarks.jobs import JOBS
from benchmarks.methods import FLOOR, METHODS
from benchmarks.problem import Problem, Shape, make_problem

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(Shape(5003, 64, 128), 200, torch.bfloat16, "cuda")


@pytest.mark.parametrize("job", JOBS)
def test_methods_agree_with_float64(problem, job):
    runs = [name for name in METHODS if METHODS[name].missing("cuda") is None and not METHODS[name].compiles]
    names = [name for name in runs if METHODS[name].same_loss]
    for row in loss.measure_job(problem, "gate", job, names, "cuda", rounds=3):
        assert row["status"] == "ok" and len(row["seconds"]) >= 3, row
        if row["method"] != FLOOR:
            assert row["peak_extra_bytes"] > 0
            bound = 5e-3 if row["method"] == "ours" else 0.5
            assert 0 < max(row["gradient_errors"].values()) < bound, row


def test_running_out_of_memory_is_a_row_and_harms_nobody(problem, monkeypatch):
    def make(context):
        return lambda x: x.student.sum() + torch.empty(1 << 45, device="cuda").sum()

    monkeypatch.setitem(METHODS, "trl", methods.Method("too large", make))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    rows = {r["method"]: r for r in loss.measure_job(problem, "gate", "reverse-kl", ("trl", "ours"), "cuda", rounds=3)}
    assert rows["trl"]["status"] == "out of memory" and not rows["trl"]["seconds"]
    assert rows["ours"]["status"] == "ok"
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
