"""gradient_tolerance reaches the loss, and the log says what was left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpo_runs import grpo_trainer
from tiny import trainer_options
from trainers import loss_and_gradients, make_trainer, rollout

from vgs import VGSConfig
from vgs_kernels.active_columns import SHARES

NAMES = (*SHARES, "gradient_lost_max")


def test_what_is_left_out_is_logged(tmp_path: Path) -> None:
    options = {"eta": 0.5, "max_steps": 1, "gradient_tolerance": 0.95}
    whole = make_trainer(tmp_path / "a", **options)
    batch = rollout(whole)
    split = make_trainer(tmp_path / "b", max_tokens_per_pass=150, **options)
    for trainer in (whole, split):
        loss_and_gradients(trainer, trainer.with_teacher(batch))
        found = {name: trainer.open_metrics[name][-1] for name in NAMES}
        assert 0 < found["gradient_kept"] < 1
        assert 0 < found["gradient_lost"] < found["gradient_lost_max"] <= 0.95
        assert 0 < abs(found["gradient_tail"]) < found["gradient_lost"]
    whole.train()
    assert set(NAMES) <= whole.state.log_history[0].keys()
    assert "eval_loss" in whole.evaluate()  # without any gradient


def test_beside_reinforcement(tmp_path: Path) -> None:
    trainer = grpo_trainer(tmp_path, max_steps=1, gradient_tolerance=0.95)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["gradient_kept"] <= 1


def test_it_is_refused_out_of_range(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_tolerance must be in \[0, 1\), got 1"):
        VGSConfig(**trainer_options(tmp_path, gradient_tolerance=1.0))
