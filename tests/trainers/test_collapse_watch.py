"""What steering remembers: eta, and the warning of a collapse."""

from __future__ import annotations

import logging
import math

import pytest

from vgs.errors import ConfigError
from vgs.trainers.collapse_watch import SteeringState


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (1.0, math.nan), (math.inf, 1.0)])
def test_eta_of_a_vanishing_gradient_is_an_error(norms: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="Set eta to a number"):
        SteeringState().add_ratio(*norms)


def test_a_run_that_measures_eta_otherwise_takes_its_own_ratio() -> None:
    state = SteeringState()
    state.keep_ratio(0.8, 0.0)
    assert state.eta_at("measure", 1.0, 0.1) == 0.8, "until there is one"
    state.add_ratio(1.0, 2.0)
    assert state.eta_at("measure", 1.0, 0.1) == 0.5 and state.eta_at("tracked", 1.0, 0.1) == 0.8
    assert SteeringState().eta_at("cheap", 1.0, 0.1) == 0.1


def observe(language: list[float], student_vds: float) -> int:
    state = SteeringState()
    return sum(state.watch(value, student_vds, vds=1.0) for value in language)


def test_collapse_warning(caplog: pytest.LogCaptureFixture) -> None:
    climbing = [0.8] * 5 + [4.0] * 20
    with caplog.at_level(logging.WARNING):
        assert observe(climbing, student_vds=0.1) == 1, "once"
    assert "language 0.800 -> 4.000" in caplog.text
    assert "Guard gamma" in caplog.text
    assert observe(climbing, student_vds=0.9) == 0, "a student that looks at the image"
    assert observe([0.8] * 30, student_vds=0.1) == 0, "a prior that stays"
    assert observe([0.8] * 5 + [4.0] * 4, student_vds=0.1) == 0, "too early to tell"


def test_a_step_is_the_mean_of_its_micro_batches() -> None:
    state = SteeringState()
    for language in (1.0, 3.0, 5.0, 6.0):
        state.observe({"language": language, "student_vds": 0.5, "vds": 1.0, "eta": 1.0}, micro_batches=2)
    assert state.language_start == [2.0, 5.5]
    state.language_start = [1.0] * state.window
    for vds in (1.0, 2.0):
        state.observe({"language": 1.0, "student_vds": vds / 2, "vds": vds}, micro_batches=2)
    assert state.recent == [[1.0, 0.75, 1.5]]


def test_what_a_checkpoint_holds() -> None:
    """By these names older checkpoints have it."""
    state = SteeringState()
    state.add_ratio(1.0, 2.0)
    state.observe({"language": 1.0, "student_vds": 0.5, "vds": 1.0, "sight": 0.5}, micro_batches=1)
    stored = {"ratios": [0.5], "language_start": [1.0], "recent": [], "warned": False}
    stored |= {"ratio": None, "sight": 0.5, "language": 1.0, "guard": 0.0}
    assert type(state).__name__ == "SteeringState" and state.state() == {"args": {}, "attributes": stored}
