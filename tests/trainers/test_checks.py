"""What stops a run before it starts."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import trl
from accelerate.utils import DistributedType
from tiny import tiny_model, tiny_processor, tiny_samples, tiny_tokenizer, trainer_options
from torch import nn
from trainers import make_trainer
from transformers import Qwen3VLForConditionalGeneration

from vgs import VGSConfig, VGSGRPOConfig, VGSGRPOTrainer, VGSTrainer
from vgs.errors import ConfigError
from vgs.teachers.local import Offload
from vgs.trainers.checks import check_engine, check_logits, check_student, has_column


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
        ({"processing_class": object()}, TypeError, "processing_class must be a processor .* got object"),
        ({"processing_class": tiny_tokenizer()}, ConfigError, "must be the processor of Qwen3VL.*, got its tokenizer"),
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


def test_evidence_of_a_later_row_counts(tmp_path: Path) -> None:
    document = {"type": "text", "text": "red is one ", "evidence": True}
    samples = without("images")
    samples[1] = {**samples[1], "prompt": [{"role": "user", "content": [document, {"type": "text", "text": "red ?"}]}]}
    assert make_trainer(tmp_path, samples=samples).packs


def test_columns_as_far_as_they_are_known() -> None:
    assert has_column([], "images") and has_column(tiny_samples(1), "images") and not has_column(without("x"), "x")
    assert has_column(SimpleNamespace(), "images") and has_column(SimpleNamespace(column_names=None), "images")
    assert not has_column(SimpleNamespace(column_names=["prompt"]), "images")


def text_model(seed: int) -> nn.Module:
    """A text-only model that knows the tiny tokenizer's words."""
    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.Qwen2ForCausalLM(config)


def text_samples() -> list[dict]:
    return [{"prompt": x["prompt"], "answer": x["answer"]} for x in tiny_samples(4)]


def text_trainer(tmp_path: Path, **options: Any) -> VGSTrainer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}assistant"
    return VGSTrainer(
        model=text_model(0),
        teacher_model=text_model(1),
        args=VGSConfig(**trainer_options(tmp_path, max_steps=2, **options)),
        train_dataset=text_samples(),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("preset", ["opd", "gkd"])
def test_a_text_only_student_trains_where_no_image_is_needed(tmp_path: Path, preset: str) -> None:
    trainer = text_trainer(tmp_path, preset=preset)
    trainer.train()
    assert all(math.isfinite(x["loss"]) and x["loss"] > 0 for x in trainer.state.log_history[:2])


def test_a_rank_without_responses_to_a_text_only_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pass is empty where another rank still has one."""
    trainer = text_trainer(tmp_path, preset="gkd", max_tokens_per_pass=60)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    batch = trainer.with_teacher(trainer.sample(list(trainer.train_dataset)))
    passes = trainer.plan_passes(batch, batch["num_items_in_batch"], trainer.objective, terms=False)
    loss, output = trainer.step_scorer.pass_loss(trainer.student, passes, [])
    loss.backward()
    assert loss.item() == 0 and len(output.divergence) == 0
    assert all(p.grad is not None and not p.grad.any() for p in trainer.student.model.parameters())


def test_reinforcement_learning_alone_needs_no_images(tmp_path: Path) -> None:
    trainer = VGSGRPOTrainer(
        model=tiny_model(0),
        args=VGSGRPOConfig(**trainer_options(tmp_path, alpha=0.0, num_generations=2, max_steps=2)),
        reward_funcs=[lambda completions, **columns: [float(len(x[-1]["content"])) for x in completions]],
        train_dataset=text_samples(),
        processing_class=tiny_processor(),
    )
    trainer.train()
    assert len([x for x in trainer.state.log_history if "loss" in x]) == 2


def test_a_text_only_student_is_refused_where_images_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compares prompts with and without images"):
        text_trainer(tmp_path)
    with pytest.raises(ConfigError, match="model must be a vision-language model, got Qwen2ForCausalLM"):
        check_student(text_model(0), has_processor=False, needs_images=True)


def test_prompts_of_plain_text(tmp_path: Path) -> None:
    """As TRL takes them: no template is applied."""
    samples = [{"prompt": text, "answer": "a"} for text in ("red ?", "what is the answer : a b ?")] * 4
    trainer = make_trainer(tmp_path, samples=samples, preset="opd", max_steps=2)
    trainer.train()
    expected = {tuple(trainer.processing_class.tokenizer(x["prompt"])["input_ids"]) for x in samples}
    groups = trainer.sample(samples)["groups"]
    assert {tuple(group.prompt_ids.tolist()) for group in groups} == expected
    with pytest.raises(ConfigError, match="sample 0: images has 1 entries, but a prompt of plain text has no place"):
        trainer.sample([{**samples[0], "images": tiny_samples(1)[0]["images"]}])


@pytest.mark.parametrize("form", ["image", "in the prompt"])
def test_pictures_in_other_places(tmp_path: Path, form: str) -> None:
    """TRL's column ``image``, and prompts that hold their own."""
    usual, samples = tiny_samples(4), []
    for sample in usual:
        (image,), text = sample["images"], {"type": "text", "text": sample["prompt"][0]["content"]}
        kept = {"prompt": sample["prompt"], "answer": sample["answer"], "image": image}
        if form != "image":
            block = {"type": "image", "image": image}
            kept = {"prompt": [{"role": "user", "content": [block, text]}], "answer": sample["answer"]}
        samples.append(kept)
    trainer = make_trainer(tmp_path, samples=samples, max_steps=1)
    trainer.train()
    for one, other in zip(trainer.sample(samples)["groups"], trainer.sample(usual)["groups"], strict=True):
        assert torch.equal(one.prompt_ids, other.prompt_ids) and torch.equal(one.text_prompt_ids, other.text_prompt_ids)
        assert torch.equal(one.images["pixel_values"], other.images["pixel_values"])


def test_logits_that_the_loss_would_not_read_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Qwen3VLForConditionalGeneration.forward

    def halved(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits / 2
        return output

    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "forward", halved)
    with pytest.raises(ConfigError, match=r"^model, a Qwen3VLForConditionalGeneration, has logits .* off by"):
        make_trainer(tmp_path)
    unfilled = tiny_model(0)
    unfilled.lm_head.weight.data.fill_(math.nan)
    check_logits("model", unfilled, torch.tensor([8, 9]))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"eta": 1.0, "teacher_offload": True}, "DEEPSPEED", "teacher_offload=True needs a whole teacher"),
        ({"eta": "measure"}, "FSDP", "eta='measure' needs parameters that are whole or sharded by FSDP2"),
        ({"eta": "exact"}, "DEEPSPEED", "eta='exact' needs parameters that are whole or sharded by FSDP2"),
        ({"eta": "cheap", "eta_every": 8}, "DEEPSPEED", "eta='cheap' needs parameters"),
        ({"eta": "cheap"}, "DEEPSPEED", None),
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
    if kind == "FSDP":
        check_engine(args, tiny_model(1), DistributedType[kind], fsdp2=True)


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
    assert seen == [(trainer.args, trainer.teacher_model, DistributedType.NO, False)]


def test_a_teacher_elsewhere_is_not_offloaded() -> None:
    teacher = tiny_model(1)
    teacher.model.visual.to("meta")
    with pytest.raises(ValueError, match="whole teacher on cpu to begin with, but parameters are on meta"):
        Offload(teacher, [], torch.device("cpu"))
