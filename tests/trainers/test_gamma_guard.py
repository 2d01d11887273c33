"""The guard of gamma and its warm-up: what they measure, what they do to gamma, splits, ranks and resumed runs."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from resume_worker import build, differences, everything
from tiny import tiny_samples
from trainers import loss_and_gradients, loss_of, make_trainer, rollout, scripted_run

from vgs import VGSConfig
from vgs.trainers import gamma_guard
from vgs.trainers.collapse_watch import SteeringState
from vgs.trainers.gamma_guard import BLIND, DECAY, RISE, SEEING, allowed, followed


def test_the_factor_falls_and_comes_back() -> None:
    sights = torch.linspace(0, 1, 101).tolist()
    factors = [allowed(sight, 1.0, 1.0) for sight in sights]
    assert factors == sorted(factors) and factors[0] == 0 and factors[-1] == 1
    assert max(b - a for a, b in pairwise(factors)) < 0.1, "smooth"
    assert [allowed(x, 1.0, 1.0) for x in (BLIND, SEEING)] == [0, 1]
    drifts = [allowed(1.0, language, 1.0) for language in torch.linspace(1, 3, 101).tolist()]
    assert drifts == sorted(drifts, reverse=True) and drifts[0] == 1 and drifts[-1] == 0
    assert allowed(1.0, 0.0, 0.0) == 1 and allowed(1.0, 0.5, 0.0) == 0, "a language term that begins at 0"
    assert allowed(None, None, None) == 1, "nothing is known before the first step"
    assert followed(0.8, 0.2) == 0.2, "down at once"
    assert followed(0.2, 0.8) == pytest.approx(0.2 + RISE * 0.6) and followed(1.0, 1.0) == 1.0


def means(sight: float, vds: float, language: float) -> dict[str, float]:
    return {"sight": sight, "vds": vds, "language": language, "student_vds": sight * vds}


def test_micro_batches_count_by_their_tokens() -> None:
    """sum(seen) / sum(vds) over 30 and 10 tokens; a step without evidence or with a NaN tells nothing."""
    state = SteeringState()
    state.observe(means(0.5, 2.0, 1.0), 2, tokens=30)
    assert state.sight is None
    state.observe(means(0.1, 4.0, 3.0), 2, tokens=10)
    assert state.sight == pytest.approx((30 * 0.5 * 2 + 10 * 0.1 * 4) / (30 * 2 + 10 * 4))
    assert state.language == pytest.approx((30 + 30) / 40)
    before = state.sight
    state.observe(means(0.0, 0.0, 1.0), 1)
    assert state.sight == before
    state.observe(means(float("nan"), 1.0, float("nan")), 1)
    assert state.sight == before and state.language == pytest.approx(DECAY * 1.5 + 1 - DECAY)


def test_it_measures_before_it_lets_steering_act() -> None:
    """No gamma until the start of `language` is known; then it rises, and a drift from the first steered step on is
    held against what `language` was without steering."""
    state, factors = SteeringState(), []
    for language in [0.1] * state.window + [0.1, 0.14, 0.2, 0.3, 0.3, 0.3, 0.3]:
        factors.append(state.guard)
        state.observe(means(1.0, 1.0, language), 1)
    assert factors[: state.window] == [0] * state.window and state.language_start == [0.1] * state.window
    assert factors[state.window : state.window + 3] == pytest.approx([RISE, 1 - (1 - RISE) ** 2, 1 - (1 - RISE) ** 3])
    assert factors[-1] == 0, "three times its start"
    waiting = SteeringState()
    for _ in range(3):
        waiting.observe(means(1.0, 1.0, float("nan")), 1)
    assert waiting.guard == 0 and waiting.language_start == [], "steps that tell nothing do not count"


def measured(state: SteeringState) -> None:
    """As if it had seen its first steps, with a steady language term."""
    state.language_start, state.guard = [1e3] * state.window, 1.0


def acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on, and well inside of the ramp."""
    for name, value in {"BLIND": 0.0, "SEEING": 1.0, "RISE": 1.0}.items():
        monkeypatch.setattr(gamma_guard, name, value)
    monkeypatch.setattr(SteeringState, "window", 1)


def test_sight_is_that_of_the_tokens(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eta=0.5, per_device_train_batch_size=8)
    measured(trainer.steering)
    batch, kept = rollout(trainer), []
    original = trainer.step_scorer.pass_loss
    trainer.step_scorer.pass_loss = lambda *args: kept.append(original(*args)) or kept[-1]
    loss_of(trainer, batch)
    output = kept[0][1]
    expected = torch.minimum(output.student_vds, output.vds).sum() / output.vds.sum()
    assert 0 < expected < 1
    assert trainer._metrics["train"]["sight"][-1] == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.steering.sight == pytest.approx(expected.item(), rel=1e-5)
    assert trainer._metrics["train"]["gamma_effective"] == [2.0], "what was allowed before it"
    trainer.state.global_step = 1
    assert trainer.objective.gamma == pytest.approx(2.0 * allowed(expected.item(), None, None), rel=1e-4)


def test_a_blind_student_is_distilled_plainly(tmp_path: Path) -> None:
    """Loss and gradient are those of gamma 0, eta measured or not, and it goes on being watched."""
    results = []
    for options in ({"eta": "measure"}, {"eta": 1.0, "gamma": 0.0}):
        trainer = make_trainer(tmp_path, lam=0.5, per_device_train_batch_size=8, **options)
        batch = rollout(trainer)
        trainer.steering.guard, trainer.steering.ratios = 0.0, [0.4]
        assert (trainer.objective.gamma, trainer.objective.eta) == (0.0, 1.0)
        results.append(loss_and_gradients(trainer, batch))
        assert trainer.steering.sight > 0, "it goes on being watched"
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], gradient) for name, gradient in results[1][1].items())


@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_warm_up_is_a_line(tmp_path: Path, schedule: str) -> None:
    options = {"eta": "measure", "schedule": schedule, "gamma_guard": False}
    trainer = make_trainer(tmp_path, max_steps=5, gamma_warmup_steps=4, **options)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "gamma_effective" in entry]
    assert [entry["gamma_effective"] for entry in logged] == [0.0, 0.5, 1.0, 1.5, 2.0]
    ratio = trainer.steering.ratios[0]
    assert [entry["eta"] for entry in logged] == pytest.approx([1 / (1 + x / 4 * (1 / ratio - 1)) for x in range(5)])
    assert trainer.model.eval() and trainer.objective.gamma == 2.0, "evaluation has one measure for all steps"


def test_gamma_0_of_a_warm_up_is_plain_distillation(tmp_path: Path) -> None:
    """The teacher's rows of a sampled batch serve a gamma above 0, too."""
    warm = make_trainer(tmp_path, eta=1.0, lam=0.0, gamma_warmup_steps=9, log_terms=False)
    plain = make_trainer(tmp_path, eta=1.0, lam=0.0, gamma=0.0, log_terms=False)
    batch = rollout(warm)
    assert all("text" in entry.rows for entry in batch["teacher"])
    assert loss_of(warm, batch).item() == pytest.approx(loss_of(plain, batch).item(), rel=1e-6)


def test_the_split_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch of 8, and four of 2: the same gammas and the same weights."""
    acts_at_once(monkeypatch)
    options = {"vds_scope": "trajectory", "eta": "measure"}
    whole, split = (scripted_run(tmp_path, *shape, **options) for shape in ((8, 1), (2, 4)))
    ours, theirs = (
        [entry["gamma_effective"] for entry in run.state.log_history if "gamma_effective" in entry]
        for run in (whole, split)
    )
    assert ours == pytest.approx(theirs, rel=1e-4) and 0.05 < ours[1] < 1.95
    assert whole.steering.sight == pytest.approx(split.steering.sight, rel=1e-4)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(split.model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_resumed_run_has_the_same_gammas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    acts_at_once(monkeypatch)
    options = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "gamma_warmup_steps": 3, "eval_strategy": "no"}
    whole = build(tmp_path, **options)
    whole.train()
    expected = everything(whole)
    gammas = [entry["gamma_effective"] for entry in expected["logs"] if "gamma_effective" in entry]
    assert len(set(gammas)) == 4 and 0 < gammas[3] < 2
    again = build(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differences(everything(again), expected) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prior": "frozen"}, "prior='frozen' does not feed back"),
        ({"gamma": 0.0}, "gamma is 0"),
        ({"log_terms": False}, "log_terms=False"),
        ({"preset": "opd"}, "does not steer"),
    ],
)
def test_where_it_is_off(tmp_path: Path, options: dict, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    assert VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False).guards_gamma, "on by default"
    with caplog.at_level(logging.WARNING):
        args = VGSConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gamma_guard=True, **options)
    assert not args.guards_gamma and reason in args.unguarded
    assert "gamma_guard" in caplog.text and "without effect" in caplog.text


def test_a_trainer_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vgs"):
        make_trainer(tmp_path, prior="frozen", samples=tiny_samples(4))
    assert "gamma is not guarded: prior='frozen'" in caplog.text
