"""``vgs capture`` on saved tiny models with the real processor of their family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_checkpoints import photos
from safetensors import safe_open
from safetensors.torch import load_file
from teachers import command, refused
from tiny import plain_rows, save_tiny_checkpoint, tiny_image, trainer_options
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.rows import Inputs
from vgs.data.sources import DataSource, load_samples
from vgs.evaluation.kl_gap import on_policy
from vgs.evaluation.sampling import Sampling
from vgs.models.heads import read_head

QUESTIONS, OUT, CAPTURED = ("red ?", "blue ?", "what is in ?", "a ?"), "rows.safetensors", Path("rows.safetensors")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Four questions with pictures and two saved models, the teacher's wider; the working directory is theirs."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": text, "answer": "a", "images": [f"{n}.png"]} for n, text in enumerate(QUESTIONS)]
    for number in range(len(rows)):
        tiny_image(number).save(f"{number}.png")
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": {"path": str(save_tiny_checkpoint(tmp_path / "student", seed=0))},
        "teacher": {"path": str(save_tiny_checkpoint(tmp_path / "teacher", seed=1, hidden=48)), "dtype": "float32"},
        "data": {"train": {"path": "data.jsonl"}, "eval": {"path": "data.jsonl"}},
        "training": trainer_options(Path("run"), temperature=0.8, loss_temperature=2.0),
    }


def notes() -> dict:
    with safe_open(CAPTURED, "pt") as file:
        return json.loads(file.metadata()["notes"])


def test_rows_are_those_of_the_models_own_forward(config: dict, capsys: pytest.CaptureFixture) -> None:
    """Answers are sampled in batches, and each batch has a seed of its own."""
    assert command("capture", config, "--out", OUT, "--batch-size", "2", "--seed", "3") == 0
    models = {
        name: AutoModelForImageTextToText.from_pretrained(config[name]["path"]) for name in ("student", "teacher")
    }
    processor = AutoProcessor.from_pretrained(config["student"]["path"])
    samples = load_samples(DataSource(path="data.jsonl"))
    samples = [samples[index] for index in range(4)]
    sampling = Sampling(greedy=False, max_new_tokens=6, temperature=0.8)
    answers = [
        ids
        for first in (0, 2)
        for ids in on_policy(
            models["student"], processor, samples[first : first + 2], sampling, seed=3 + first, batch_size=2
        )
    ]
    found = load_file(OUT)
    for name, view, flag in (
        ("student", "student", True),
        ("student", "student_text", False),
        ("teacher", "teacher", True),
        ("teacher", "teacher_text", False),
    ):
        simple = [{**sample, "prompt": [{"content": text}]} for sample, text in zip(samples, QUESTIONS, strict=True)]
        with torch.no_grad():
            parts = [plain_rows(models[name], processor, *pair, flag) for pair in zip(simple, answers, strict=True)]
        torch.testing.assert_close(found[view], torch.cat(parts), rtol=1e-4, atol=1e-5)
    facts, tokens = notes(), sum(map(len, answers))
    assert f"{OUT}: {tokens} tokens in four views" in capsys.readouterr().out
    assert facts["tokens"] == tokens and facts["temperature"] == 2.0 and not facts["one_head"]
    assert facts["student"] == {"name": config["student"]["path"], "scale": 1.0, "softcap": None}
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    problem = Inputs("cpu", "float32", captured=OUT).make("rows", tokens)
    for name in models:
        logits = read_head(models[name], torch.float32).logits(found[name]) / 2.0
        torch.testing.assert_close(problem.logits(slice(None), (name,))[0].float(), logits, rtol=1e-4, atol=1e-5)


def test_the_first_tokens_of_another_student(config: dict) -> None:
    """Which is the teacher here: one head, stored once. Another config has another digest."""
    other = config["teacher"]["path"]
    assert command("capture", config, "--out", OUT, "--tokens", "1", "--model", other, "--batch-size", "1") == 0
    found, facts = load_file(OUT), notes()
    assert set(found) == {"student", "student_text", "teacher", "teacher_text", "student_weight"}
    assert facts["one_head"] and facts["student"]["name"] == facts["teacher"]["name"] == other
    assert len(found["student"]) == facts["tokens"] == 1 and found["student_weight"].shape[1] == 48
    torch.testing.assert_close(found["student"], found["teacher"])
    CAPTURED.unlink()
    changed = {**config, "training": {**config["training"], "vocab_size": 30}}
    assert command("capture", changed, "--out", OUT, "--tokens", "1", "--batch-size", "1") == 0
    assert notes()["config"] != facts["config"]
    assert [load_file(OUT)[f"{model}_weight"].shape[0] for model in ("student", "teacher")] == [30, 30]


def test_soft_caps_are_stored(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (path, *_) = photos(tmp_path / "photos")
    Path("data.jsonl").write_text(
        json.dumps({"question": "what is it ?", "answer": "a", "images": [f"photos/{path.name}"]})
    )
    models = {"student": checkpoint("gemma4"), "teacher": checkpoint("gemma4", teacher=True)}
    config = {name: {"path": str(path)} for name, path in models.items()}
    config |= {"data": {"train": {"path": "data.jsonl"}, "eval": {"path": "data.jsonl"}}}
    assert command("capture", {**config, "training": trainer_options(Path("run"))}, "--out", OUT) == 0
    assert notes()["student"]["softcap"] == notes()["teacher"]["softcap"] == 30.0


def test_what_is_refused(config: dict, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    CAPTURED.write_text("mine")
    assert "--out 'rows.safetensors' exists; name a new file." in refused(capsys, "capture", config, "--out", OUT)
    assert CAPTURED.read_text() == "mine"
    self_taught = {**config, "objective": "opsd"}
    del self_taught["teacher"]
    assert "capture needs a separate teacher" in refused(capsys, "capture", self_taught, "--out", "x.safetensors")
    lone = {**config, "data": {"train": config["data"]["train"]}}
    assert "no data.eval" in refused(capsys, "capture", lone, "--out", "x.safetensors")
    monkeypatch.setattr(
        "vgs.cli.scored_pair.on_policy", lambda model, processor, samples, *_, **__: [[] for _ in samples]
    )
    sentence = refused(capsys, "capture", config, "--out", "x.safetensors")
    assert "capture needs tokens, but all 4 answers of the student are empty." in sentence
    assert not Path("x.safetensors").exists()
