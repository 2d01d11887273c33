"""What stops a run before it starts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from accelerate.utils import DistributedType
from tiny import tiny_model, tiny_processor, tiny_samples, tiny_tokenizer, trainer_options
from torch import nn
from trainers import make_trainer

from vgs import VGSConfig, VGSTrainer
from vgs.errors import ConfigError
from vgs.trainers.checks import check_engine, check_pair, has_column
from vgs.trainers.teacher import Offload


def other_image_token() -> nn.Module:
    model = tiny_model(1)
    model.config.image_token_id = 20
    return model


def without(column: str) -> list[dict]:
    return [{name: value for name, value in sample.items() if name != column} for sample in tiny_samples(2)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tools": [print]}, ConfigError, "tools are not supported"),
        ({"processing_class": tiny_tokenizer()}, TypeError, "processing_class must be a processor"),
        ({"teacher_model": None}, ConfigError, "teacher_model is needed"),
        ({"args": trl.DistillationConfig("x", use_cpu=True, bf16=False)}, TypeError, "args must be a VGSConfig"),
        ({"teacher_model": other_image_token()}, ConfigError, "teacher_model has image and video token ids"),
        ({"args": {"preset": "opsd"}}, ConfigError, "preset='opsd' has a teacher of kind 'frozen', which VGSTrainer"),
        ({"train_dataset": without("images")}, ConfigError, "compares prompts with and without images, but train_data"),
        (
            {"train_dataset": without("images"), "args": {"preset": "vcsd"}},
            ConfigError,
            "preset='vcsd' degrades images, but train_dataset has no column 'images'",
        ),
        (
            {"args": {"preset": "gkd", "divergence": {"support": "teacher_top_k", "top_k": 99}}},
            ConfigError,
            "preset='gkd' looks at the top_k=99 likeliest tokens, but the vocabulary has 32",
        ),
        (
            {"args": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}},
            ConfigError,
            "needs gradient checkpointing that is not reentrant",
        ),
    ],
)
def test_a_trainer_that_cannot_be_is_refused(tmp_path: Path, change: dict, error: type, message: str) -> None:
    arguments = {
        "model": tiny_model(0),
        "teacher_model": tiny_model(1),
        "args": {},
        "train_dataset": tiny_samples(2),
        "processing_class": tiny_processor(),
        **change,
    }
    if isinstance(arguments["args"], dict):
        arguments["args"] = VGSConfig(**trainer_options(tmp_path, **{"eta": "measure", **arguments["args"]}))
    with pytest.raises(error, match=message):
        VGSTrainer(**arguments)


def test_plain_distillation_needs_no_images(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, samples=without("images"), preset="opd")
    assert not has_column(trainer.train_dataset, "images")
    with pytest.raises(ConfigError, match="compares prompts"):
        make_trainer(tmp_path, samples=without("images"), gamma=0.0, lam=0.1)


def test_columns_as_far_as_they_are_known() -> None:
    assert has_column([], "images") and has_column(tiny_samples(1), "images") and not has_column(without("x"), "x")
    assert has_column(SimpleNamespace(), "images") and has_column(SimpleNamespace(column_names=None), "images")
    assert not has_column(SimpleNamespace(column_names=["prompt"]), "images")


def test_a_text_only_student_is_refused() -> None:
    student, text = tiny_model(0), SimpleNamespace(config=SimpleNamespace(to_dict=dict))
    check_pair(student, tiny_model(1), has_processor=True)
    with pytest.raises(ConfigError, match="must be a vision-language model with a processor, got Qwen3VL"):
        check_pair(student, tiny_model(1), has_processor=False)
    with pytest.raises(ConfigError, match="must be a vision-language model with a processor, got SimpleNamespace"):
        check_pair(text, tiny_model(1), has_processor=True)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"eta": 1.0, "teacher_offload": True}, "DEEPSPEED", "teacher_offload=True needs a whole teacher"),
        ({"eta": "measure"}, "FSDP", 'eta="measure" needs whole parameters'),
        ({"eta": "measure"}, "DEEPSPEED", 'eta="measure" needs whole parameters'),
        ({"eta": 1.0, "teacher_offload": True}, "FSDP", None),
        ({"eta": "measure"}, "MULTI_GPU", None),
        ({"eta": 1.0}, "DEEPSPEED", None),
    ],
)
def test_what_holds_the_parameters(tmp_path: Path, options: dict, kind: str, message: str | None) -> None:
    args = VGSConfig(**trainer_options(tmp_path, **options))
    if message is None:
        check_engine(args, tiny_model(1), DistributedType[kind])
        return
    with pytest.raises(ConfigError, match=message):
        check_engine(args, tiny_model(1), DistributedType[kind])


def test_a_quantized_teacher_is_not_offloaded(tmp_path: Path) -> None:
    teacher = tiny_model(1)
    teacher.is_quantized = True
    args = VGSConfig(**trainer_options(tmp_path, teacher_offload=True, eta=1.0))
    with pytest.raises(ConfigError, match="cannot move a quantized teacher"):
        check_engine(args, teacher, DistributedType.NO)


def test_the_engine_of_a_run_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vgs.trainers import preparation

    seen = []
    monkeypatch.setattr(preparation, "check_engine", lambda *given: seen.append(given))
    trainer = make_trainer(tmp_path)
    assert seen == [(trainer.args, trainer.teacher_model, DistributedType.NO)]


def test_a_teacher_elsewhere_is_not_offloaded() -> None:
    teacher = tiny_model(1)
    teacher.model.visual.to("meta")
    with pytest.raises(ValueError, match="whole teacher on cpu to begin with, but parameters are on meta"):
        Offload(teacher, [], torch.device("cpu"))
