"""The loss has a temperature of its own, apart from that of sampling; and the overlap in the log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from grpo_runs import grpo_trainer
from tiny import trainer_options
from trainers import loss_and_gradients, make_trainer, rollout

from vgs import SelfDistillationConfig, VGSConfig, VGSGRPOConfig
from vgs.objectives.presets import PRESETS


def settings(preset: str, folder: Path, **options):
    """The settings of a preset's trainer."""
    kind = VGSConfig if PRESETS[preset].teacher == "separate" else SelfDistillationConfig
    generations = max(PRESETS[preset].generations, 1)
    options = {"preset": preset, "num_generations": generations, "per_device_train_batch_size": 8} | options
    return kind(**trainer_options(folder, eta=1.0, **options))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_both(tmp_path: Path, preset: str) -> None:
    args = settings(preset, tmp_path, temperature=0.7, loss_temperature=2.0)
    assert (args.temperature, args.objective(1.0).temperature) == (0.7, 2.0)
    assert args.preset_in_force.divergence.temperature == 2.0
    alike = settings(preset, tmp_path, temperature=0.7)
    assert alike.objective(1.0).temperature == alike.preset_in_force.divergence.temperature == 0.7


def test_sampling_has_one_and_the_loss_the_other(tmp_path: Path) -> None:
    apart = make_trainer(tmp_path, eta=0.5, lam=0.5, temperature=0.7, loss_temperature=2.0)
    alike = make_trainer(tmp_path, eta=0.5, lam=0.5, temperature=2.0)
    assert (apart.generation_config.temperature, apart.objective.temperature) == (0.7, 2.0)
    batch = rollout(apart)
    found, expected = (loss_and_gradients(trainer, batch) for trainer in (apart, alike))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())
    cold = make_trainer(tmp_path, eta=0.5, lam=0.5, temperature=0.7)
    assert loss_and_gradients(cold, batch)[0] != pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("lam", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
def test_reinforcement_keeps_the_policy_at_the_temperature_of_sampling(tmp_path: Path, lam: float) -> None:
    """The gradient is (1 - alpha) * that of GRPO alone + alpha * that of the distillation alone, each at its own."""
    runs = {"policy": (0.0, {}), "loss": (1.0, {}), "both": (0.4, {})}
    gradients = {}
    for name, (alpha, changes) in runs.items():
        options = {"temperature": 0.8, "loss_temperature": 2.0, "lam": lam, "max_steps": 1, **changes}
        trainer = grpo_trainer(tmp_path, alpha=alpha, **options)
        before = {key: x.detach().clone() for key, x in trainer.model.named_parameters()}
        trainer.train()
        gradients[name] = {key: before[key] - x.detach() for key, x in trainer.model.named_parameters()}
        assert trainer.generation_config.temperature == 0.8
    for key, both in gradients["both"].items():
        expected = 0.6 * gradients["policy"][key] + 0.4 * gradients["loss"][key]
        torch.testing.assert_close(both, expected, rtol=1e-3, atol=1e-6)
    assert any(x.abs().max() > 1e-5 for x in gradients["policy"].values())


def test_it_is_refused_out_of_range(tmp_path: Path) -> None:
    for kind in (VGSConfig, VGSGRPOConfig):
        with pytest.raises(ValueError, match="loss_temperature must be > 0, got 0"):
            kind(**trainer_options(tmp_path, num_generations=2, loss_temperature=0.0))
    with pytest.raises(ValueError, match="log_overlap must be >= 1, got 0"):
        VGSConfig(**trainer_options(tmp_path, log_overlap=0))
    with pytest.raises(ValueError, match="log_overlap must be at most 32, the columns in use, got 99"):
        make_trainer(tmp_path, log_overlap=99)


def test_the_overlap_is_logged_over_all_passes(tmp_path: Path) -> None:
    options = {"eta": 0.5, "max_steps": 1, "log_overlap": 5}
    whole = make_trainer(tmp_path / "a", **options)
    batch = rollout(whole)
    shares = []
    for trainer in (whole, make_trainer(tmp_path / "b", max_tokens_per_pass=150, **options)):
        loss_and_gradients(trainer, trainer.with_teacher(batch))
        shares.append(trainer.open_metrics["top_5_overlap"][-1])
    assert shares[0] == pytest.approx(shares[1]) and 0 < shares[0] < 1
    whole.train()
    assert 0 < whole.state.log_history[0]["top_5_overlap"] < 1
