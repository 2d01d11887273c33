"""Prompts encoded in the data loader's processes: the same numbers, each prompt once, errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_processor, tiny_samples
from trainers import make_trainer

from vgs.errors import ConfigError
from vgs.trainers import encoding
from vgs.trainers.encoding import ENCODED, EncodeAhead

TIMES = ("time", "per_second")


def history(trainer: Any) -> list[dict[str, float]]:
    trainer.train()
    return [
        {name: value for name, value in entry.items() if not any(mark in name for mark in TIMES)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("count", [1, 2])
def test_a_run_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    options: dict[str, Any] = {
        "max_steps": 2,
        "logging_steps": 1,
        "num_generations": count,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    taken, place = [], encoding.placed
    monkeypatch.setattr(encoding, "placed", lambda *x: taken.append(x) or place(*x))
    plain = history(make_trainer(tmp_path / "plain", **options))
    assert not taken
    assert {"loss", "eval_loss"} <= set().union(*plain)
    assert history(make_trainer(tmp_path / "ahead", dataloader_num_workers=1, **options)) == plain
    assert taken


def test_equal_neighbours_and_a_repeated_batch_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, encode = [], encoding.encode_groups
    monkeypatch.setattr(encoding, "encode_groups", lambda *x, **y: counts.append(len(x[1])) or encode(*x, **y))
    samples = [x for x in tiny_samples(3) for _ in range(2)]
    collate = EncodeAhead(tiny_processor(), (), {})
    found = collate(samples)
    assert counts == [3]
    assert [found[2 * i][ENCODED] is found[2 * i + 1][ENCODED] for i in range(3)] == [True] * 3
    again = collate([{**x, "answer": "other"} for x in samples])
    assert counts == [3]
    assert [x["answer"] for x in again] == ["other"] * 6
    collate(samples[1:3])  # another batch, of two prompts
    assert counts == [3, 2]


@pytest.mark.parametrize("form", [np.asarray, lambda x: torch.tensor(np.asarray(x).transpose(2, 0, 1))])
def test_pictures_whose_comparison_is_no_single_answer(form) -> None:
    """Arrays and tensors, of neighbours with one prompt and of a repeated batch."""
    sample = tiny_samples(1)[0]
    batches = [[{**sample, "images": [form(x) for x in sample["images"]]} for _ in range(2)] for _ in range(2)]
    collate = EncodeAhead(tiny_processor(), (), {})
    for batch in batches:
        one, other = (found[ENCODED] for found in collate(batch))
        assert torch.equal(one.prompt_ids, other.prompt_ids)
        assert torch.equal(one.images["pixel_values"], other.images["pixel_values"])


def test_a_bad_prompt_is_named_in_one_sentence(tmp_path: Path) -> None:
    samples = tiny_samples(4)
    trainer = make_trainer(tmp_path, samples=samples, dataloader_num_workers=1, max_steps=1)
    asked = [{"role": "user", "content": "what is <|image_pad|> ?"}]
    trainer.train_dataset = [{**samples[0], "prompt": asked}] * 4
    with pytest.raises(ConfigError, match=r"^sample 0: ") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
