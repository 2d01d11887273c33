"""A run of the command line from checkpoints, processors and photos on disk: training, then evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from covering import slow_beyond
from real_checkpoints import REAL_FAMILIES, photos
from tiny import trainer_options

from vgs.cli import main as cli

USUAL = ("internvl",)


@pytest.mark.parametrize("family", slow_beyond(USUAL, REAL_FAMILIES))
def test_train_then_eval(family: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    paths = photos(tmp_path / "photos")
    rows = [
        {"question": "what is in the picture ?", "answer": "seven", "images": [f"photos/{paths[0].name}"]},
        {
            "question": "is it in <image> or in <image> ?",
            "answer": "two",
            "images": [f"photos/{x.name}" for x in paths[:2]],
        },
        {"question": "seven or nine ?", "answer": "nine", "images": []},
        {"question": "how many squares are there ?", "answer": "three", "images": [f"photos/{paths[3].name}"]},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {"path": str(tmp_path / "data.jsonl")}
    config = {
        "student": {"path": str(checkpoint(family))},
        "teacher": {"path": str(checkpoint(family, teacher=True))},
        "data": {"train": part, "eval": part},
        "training": trainer_options(
            tmp_path / "run", max_steps=2, eta=0.5, max_prompt_length=400, per_device_train_batch_size=2
        ),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert cli.main(["train", str(path)]) == 0
    metrics = json.loads((tmp_path / "run" / "eval_results.json").read_text())
    assert 0 <= metrics["eval_accuracy"] <= 1
    out = tmp_path / "eval.json"
    assert cli.main(["eval", str(path), "--model", str(tmp_path / "run"), "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["samples"] == 4 and found["accuracy"] == pytest.approx(metrics["eval_accuracy"])
