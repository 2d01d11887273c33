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

TEMPLATE = "{% for m in messages %}{% for p in m.content %}{{ p.text }} {% endfor %}{% endfor %}answer :"


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
