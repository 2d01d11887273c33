"""A teacher in 8 bits (bitsandbytes, which also runs on a CPU): its head, its hidden states, its memory, a run."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from bitsandbytes.nn import Linear8bitLt
from peft import LoraConfig, get_peft_model
from tiny import save_tiny_checkpoint, tiny_image, trainer_options
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, modeling_utils

from vgs.cli import main as cli
from vgs.cli import resolved
from vgs.models.heads import read_head
from vgs.planning.memory import Lengths, Machine, predict

IDS = torch.tensor([[8, 9, 10, 11, 12, 13]])


def load(path: Path, **options) -> torch.nn.Module:
    section = {"path": str(path), **options}
    return AutoModelForImageTextToText.from_pretrained(path, **resolved.model_options(section))


@pytest.mark.parametrize("tie", [True, False])
def test_head_stays_and_hidden_states_stay_close(tmp_path: Path, tie: bool) -> None:
    save_tiny_checkpoint(tmp_path, hidden=64, tie=tie)
    teacher = load(tmp_path, dtype="bfloat16", load_in_8bit=True)
    exact = load(tmp_path, dtype="bfloat16")
    quantised = [name for name, module in teacher.named_modules() if isinstance(module, Linear8bitLt)]
    assert sum("language_model" in name for name in quantised) == 2 * 7
    assert sum("visual" in name for name in quantised) == 2 * 4 + 2 * 2
    assert torch.equal(read_head(teacher, torch.bfloat16).weight, exact.lm_head.weight)
    with torch.no_grad():
        states, expected = (m.base_model(input_ids=IDS).last_hidden_state.float() for m in (teacher, exact))
    error = (states - expected).norm() / expected.norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("tie", [True, False])
def test_planned_memory(tmp_path: Path, tie: bool) -> None:
    save_tiny_checkpoint(tmp_path, hidden=64, tie=tie)
    config = {"student": {"path": str(tmp_path)}, "teacher": {"path": str(tmp_path), "load_in_8bit": True}}
    teacher = load(tmp_path, dtype="bfloat16", load_in_8bit=True)
    held = sum(parameter.numel() * parameter.element_size() for parameter in teacher.parameters())
    assert predict(config, Machine(), Lengths()).parts["teacher weights"]["teacher"] == held


def test_heads_that_cannot_be_read(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path, tie=False)
    quantisation = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["visual"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=quantisation)
    with pytest.raises(TypeError, match=r"Linear8bitLt with a torch\.int8 weight\. Keep it out of"):
        read_head(model, torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"torch\.int8 weight"):
        read_head(adapted, torch.bfloat16)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    buffer = io.BytesIO()
    tiny_image(0).save(buffer, format="PNG")
    rows = [{"problem": f"<image>{word} ?", "answer": "a", "image": buffer.getvalue()} for word in ("red", "blue")]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    sections = {
        "student": {"path": str(save_tiny_checkpoint(tmp_path / "student"))},
        "teacher": {"path": str(save_tiny_checkpoint(tmp_path / "teacher", seed=1, hidden=64)), "load_in_8bit": True},
        "data": {"train": {"path": str(tmp_path / "data.parquet"), "question": "problem", "images": "image"}},
        "training": trainer_options(tmp_path / "run", max_steps=2, eta=0.5, per_device_train_batch_size=2),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def test_training_with_an_8_bit_teacher(config: Path) -> None:
    trainer = cli.train(cli.load_config(config))
    assert isinstance(trainer.teacher_model.base_model.language_model.layers[0].mlp.up_proj, Linear8bitLt)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 100 for loss in losses)
    before, after = (AutoModelForImageTextToText.from_pretrained(config.parent / x) for x in ("student", "run"))
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_reloaded_8_bit_teacher_stays_where_it_was_read(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes before 0.48 moves no such weights."""
    monkeypatch.setattr(modeling_utils, "is_bitsandbytes_available", lambda *_: False)
    path = config.parent / "teacher"
    with pytest.raises(ValueError, match=r"bitsandbytes>=0\.48"):
        load(path, load_in_8bit=True).to("cpu")
    trainer = cli.train(cli.load_config(config, ["--teacher_reload", "true", "--max_steps", "1"]))
    assert trainer.state.global_step == 1


def test_8_bit_weights_cannot_be_moved(config: Path) -> None:
    with pytest.raises(ValueError, match=r"teacher\.load_in_8bit excludes teacher_offload"):
        cli.train(cli.load_config(config, ["--teacher_offload", "true"]))
