"""Whole runs: the same result however the batch is split, over ranks, and after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launch import SUPPORT, torchrun
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import RUNS, pair_loss, scripted_run

from vgs import VGSConfig, VGSTrainer


def assert_same_weights(actual: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    start = tiny_model(0).state_dict()
    moved = max((expected[name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3, "the run must have changed something"
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reduction", ["trajectory", "token"])
def test_accumulation_1x4_equals_4x1(tmp_path: Path, reduction: str) -> None:
    options = {"loss_reduction": reduction, "vds_scope": "trajectory", "eta": "measure"}
    whole, split = (scripted_run(tmp_path, batch, steps, **options) for batch, steps in ((4, 1), (1, 4)))
    assert split.steering.ratios == pytest.approx(whole.steering.ratios, rel=1e-4)
    assert_same_weights(split.model.state_dict(), whole.model.state_dict())


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of ``trainers.py`` on two gloo ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(SUPPORT / "trainers.py", 2, str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_equal_one_process(two_ranks: Path, tmp_path: Path, run: str) -> None:
    """4 samples a step on each of two ranks against 8 in one process."""
    ranks = torch.load(two_ranks / f"{run}.pt")
    split, settings = RUNS[run]
    single = scripted_run(tmp_path, batch_size=8, accumulation=1, **settings)
    assert_same_weights(ranks["weights"], single.model.state_dict())
    names = ["eta", "accuracy"]
    if split[1] == 1:  # the host logs the mean over micro-batches
        names += ["standard", "visual", "language", "vds", "gate", "student_vds", "entropy", "vds_q40", "vds_q70"]
    for theirs, ours in zip(ranks["logs"][:2], single.state.log_history[:2], strict=True):
        assert {name: theirs[name] for name in names} == pytest.approx({name: ours[name] for name in names}, rel=1e-4)


@pytest.mark.slow
def test_a_sharded_student_gets_the_same_gradients(two_ranks: Path) -> None:
    student = tiny_model(0, tie=False)
    pair_loss(student).backward()
    gathered = torch.load(two_ranks / "sharded.pt")
    assert gathered.keys() == {name for name, p in student.named_parameters() if p.grad is not None}
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gathered[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert gathered["lm_head.weight"].abs().max() > 0


def build(output_dir: Path) -> VGSTrainer:
    options = trainer_options(
        output_dir, max_steps=4, save_strategy="steps", save_steps=2, eta="measure", gradient_accumulation_steps=2
    )
    return VGSTrainer(
        model=tiny_model(0),
        teacher_model=tiny_model(1, hidden=48),
        args=VGSConfig(**options),
        train_dataset=tiny_samples(24),
        processing_class=tiny_processor(),
    )


def test_resume_continues_the_run(tmp_path: Path) -> None:
    whole = build(tmp_path)
    whole.train()
    resumed = build(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert resumed.steering.ratios == whole.steering.ratios, "restored, not measured again"
    assert resumed.steering.language_start == pytest.approx(whole.steering.language_start, rel=1e-5)
    assert_same_weights(resumed.model.state_dict(), whole.model.state_dict(), rtol=1e-5)
