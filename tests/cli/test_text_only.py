"""Text-only models: refused at once where the objective looks at images, else checked like others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from vgs.cli import main as cli

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}answer :"  # as text-only models': content is text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    sizes |= {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "max_position_embeddings": 128}
    for seed, role in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(role)
        tokenizer.save_pretrained(role)
    Path("data.jsonl").write_text("\n".join([json.dumps({"question": "red or blue ?", "answer": "red"})] * 4))
    data = {"path": "data.jsonl", "images": None}
    training = {"output_dir": "run", "use_cpu": True, "bf16": False, "max_completion_length": 3, "max_steps": 1}
    content = {
        "student": {"path": "student"},
        "teacher": {"path": "teacher"},
        "data": {"train": data, "eval": data},
        "training": {**training, "per_device_train_batch_size": 2, "gradient_checkpointing": False},
    }
    Path("run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_refused_where_images_are_compared(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for command in ("check", "train"):
        try:
            status = cli.main([command, "run.yaml"])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        assert status == 2 and "student.path must be a vision-language model" in printed.out + printed.err


def test_checked_and_trained(folder: Path) -> None:
    assert cli.main(["check", "run.yaml", "--objective", "opd"]) == 0
    assert cli.main(["train", "run.yaml", "--objective", "opd"]) == 0
    assert cli.main(["eval", "run.yaml", "--objective", "opd", "--model", "run"]) == 0


@pytest.mark.parametrize("form", ["column", "messages"])
def test_steered_towards_a_document(folder: Path, form: str) -> None:
    """The paper's objective on a text-only pair, from a config."""
    document = "red one two three"
    marked = [{"type": "text", "text": document, "evidence": True}, {"type": "text", "text": "red or blue ?"}]
    rows = {
        "column": {"question": "red or blue ?", "answer": "red", "document": document},
        "messages": {"messages": [{"role": "user", "content": marked}], "answer": "red"},
    }
    Path("data.jsonl").write_text("\n".join([json.dumps(rows[form])] * 4))
    config = yaml.safe_load(Path("run.yaml").read_text())
    if form == "column":
        config["data"] = {part: {"path": "data.jsonl", "evidence_column": "document"} for part in ("train", "eval")}
    config["training"] |= {"logging_steps": 1, "eta": "exact", "gamma_guard": False}
    Path("run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["check", "run.yaml"]) == 0
    assert cli.main(["train", "run.yaml"]) == 0
    logged = json.loads(Path("run/checkpoint-1/trainer_state.json").read_text())["log_history"][0]
    assert logged["vds"] > 0 and logged["student_vds"] > 0 and logged["gamma_effective"] == 2.0
    assert 0 < logged["eta"] != 1
    assert cli.main(["eval", "run.yaml", "--model", "run"]) == 0
