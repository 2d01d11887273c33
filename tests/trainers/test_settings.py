"""What the settings refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import trainer_options

from vgs import VGSConfig
from vgs.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "beta must be 1.0, got 0.5"),
        (
            {"eta": "paper-7b"},
            'eta must be a number or one of "paper-2b", "paper-4b", "measure", "exact", "tracked", "cheap", got',
        ),
        ({"loss_reduction": "sum"}, "loss_reduction must be one of trajectory, token, got 'sum'"),
        ({"loss_backend": "cuda"}, "loss_backend must be one of auto, triton, torch, loops, got 'cuda'"),
        ({"control_kind": "blur"}, "control_kind must be one of .*, got 'blur'"),
        ({"divergence": 3}, r"divergence must be a section of keys, such as \{top_k: 128\}, got 3"),
        ({"max_prompt_length": 0}, "max_prompt_length must be >= 1"),
        ({"num_generations": 0}, "num_generations must be >= 1"),
        ({"num_generations": 3}, "num_generations=3 must divide per_device_train_batch_size \\* "),
        ({"packed_attention": "paged"}, "packed_attention must be one of auto, dense, flex, varlen, got 'paged'"),
        ({"lp_every": 0}, "lp_every must be >= 1"),
        (
            {"max_tokens_per_pass": 20, "max_prompt_length": 9},
            "max_completion_length=6 tokens and max_prompt_length=9 may need 30 in 2 views",
        ),
        ({"prior": "old"}, "prior must be one of live, frozen, ema, got 'old'"),
        ({"prior": "frozen", "preset": "opd"}, "prior='frozen' belongs to presets that steer; 'opd' has none"),
        ({"prior": "ema", "detach_prior": False}, "detach_prior=False needs prior='live', got 'ema'"),
        ({"prior_decay": 1.0}, r"prior_decay must be in \[0, 1\), got 1.0"),
    ],
)
def test_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VGSConfig(**trainer_options(tmp_path, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -1.0}, "eta must be > 0"),
        ({"gamma": -1.0}, "gamma must be >= 0"),
        ({"schedule": "linear"}, "schedule must be one of"),
    ],
)
def test_the_objectives_own_fields_are_checked(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VGSConfig(**trainer_options(tmp_path, **options))


def test_one_view_needs_half_the_budget(tmp_path: Path) -> None:
    options = {"max_tokens_per_pass": 15, "max_prompt_length": 9, "gamma": 0.0, "lam": 0.0, "log_terms": False}
    assert VGSConfig(**trainer_options(tmp_path, **options)).max_tokens_per_pass == 15
