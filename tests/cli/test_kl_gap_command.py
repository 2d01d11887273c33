"""``vgs kl-gap`` on saved tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from selves import privileged_samples
from tiny import save_tiny_checkpoint, tiny_model, tiny_processor, tiny_samples

from vgs.cli import main as cli
from vgs.cli import pair, runs
from vgs.evaluation.kl_gap import kl_gap, on_policy
from vgs.evaluation.sampling import Sampling


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose eval data have privileged images."""
    monkeypatch.setattr(runs, "eval_samples", lambda *_: {"": privileged_samples(5)})
    save_tiny_checkpoint(tmp_path / "before")
    monkeypatch.setattr(pair, "load_processor", lambda *_: tiny_processor())
    (tmp_path / "run.yaml").write_text(
        f"objective: visual_opsd\nstudent: {{path: {tmp_path / 'before'}}}\n"
        "data: {train: {path: x}, eval: {path: x}}\n"
        "training: {max_completion_length: 4, bf16: false}\n"
    )
    return tmp_path / "run.yaml"


def test_the_command_measures_before_and_after(config: Path, capsys: pytest.CaptureFixture) -> None:
    folder = config.parent
    save_tiny_checkpoint(folder / "after", seed=3)
    out = folder / "gap.json"
    options = ["--after", str(folder / "after"), "--samples", "3", "--out", str(out)]
    assert cli.main(["kl-gap", str(config), *options]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found == json.loads(out.read_text())
    assert found["closed"] == pytest.approx(1 - found["after"]["gap"] / found["before"]["gap"])
    model, processor, samples = tiny_model(0), tiny_processor(), privileged_samples(3)
    answers = on_policy(model, processor, samples, Sampling(greedy=False, max_new_tokens=4))
    assert found["before"] == pytest.approx(kl_gap(model, processor, samples, answers), rel=1e-4)
    assert found["after"]["to_before"] > 0 and found["after"]["gap"] != found["before"]["gap"]


def test_the_command_shows_noise(config: Path, capsys: pytest.CaptureFixture) -> None:
    found = []
    for control in ([], ["--control", "noise"]):
        cli.main(["kl-gap", str(config), *control])
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["before"])
    assert found[0]["tokens"] == found[1]["tokens"] and found[0]["gap"] != found[1]["gap"]


def test_the_command_needs_privileged_context(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(runs, "eval_samples", lambda *_: {"": tiny_samples(2)})
    with pytest.raises(SystemExit):
        cli.main(["kl-gap", str(config)])
    assert "kl-gap needs privileged context in data.eval: at least one of the columns" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["kl-gap", str(config), "--objective", "vgs", "--teacher.path", "x"])
    assert "kl-gap needs an objective with privileged context" in capsys.readouterr().err
