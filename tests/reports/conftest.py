"""Four tiny runs of the command line, two arms with two seeds each, and a report on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny import save_tiny_checkpoint, tiny_image, trainer_options

from vgs.cli import main as cli

ARMS = {"plain": ["--gamma", "0", "--lam", "0"], "vgs": []}
SEEDS = (0, 1)
INSTRUMENTS = {"log_terms_by_bin": 3, "save_samples": 2, "save_samples_every": 2, "geometry_every": 4}


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YAML file for four questions and two saved models; every instrument is on."""
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for index, (question, answer) in enumerate([("red ?", "a"), ("blue ?", "b"), ("what is in ?", "c"), ("a ?", "d")]):
        tiny_image(index).save(folder / f"{index}.png")
        rows.append({"question": question, "answer": answer, "images": [f"{index}.png"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {"path": str(folder / "data.jsonl")}
    training = trainer_options(
        folder / "run",
        **{"max_steps": 4, "eta": 0.5, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2},
        **INSTRUMENTS,
    )
    sections = {
        "student": {"path": str(save_tiny_checkpoint(folder / "student", seed=0))},
        "teacher": {"path": str(save_tiny_checkpoint(folder / "teacher", seed=1, hidden=48))},
        "data": {"train": part, "eval": part},
        "training": training,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder / "config.yaml"


@pytest.fixture(scope="session")
def runs(config: Path) -> list[Path]:
    """Folders of `vgs train`: plain-0, plain-1, vgs-0, vgs-1."""
    folders = []
    for arm, settings in ARMS.items():
        for seed in SEEDS:
            folders.append(config.parent / f"{arm}-{seed}")
            options = ["--output_dir", str(folders[-1]), "--seed", str(seed), *settings]
            assert cli.main(["train", str(config), *options]) == 0
    return folders


@pytest.fixture(scope="session")
def report(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of their report."""
    out = tmp_path_factory.mktemp("report")
    assert cli.main(["report", *map(str, runs), "--out", str(out), "--title", "Plain <and> steered"]) == 0
    return out
