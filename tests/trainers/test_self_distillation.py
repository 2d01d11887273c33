"""SelfDistillationTrainer: a student that learns from itself with privileged context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from resume_worker import differences
from selves import make_self_trainer, privileged_samples
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options

from vgs.data.prompts import encode_groups
from vgs.models.forward import score_groups
from vgs.models.heads import read_head
from vgs.trainers.self_distillation import SelfDistillationConfig, SelfDistillationTrainer
from vgs_kernels import Divergence
from vgs_kernels.reference import divergence_reference


def config(tmp_path: Path, **options: Any) -> SelfDistillationConfig:
    return SelfDistillationConfig(**trainer_options(tmp_path, **options))


def batch_of(trainer: SelfDistillationTrainer) -> dict[str, Any]:
    trainer.model.train()
    return trainer.with_teacher(trainer.sample(list(trainer.train_dataset)[:4]))


def logits(model: torch.nn.Module, groups: list) -> torch.Tensor:
    (rows,) = score_groups(model, groups, text=False)
    return rows @ read_head(model, rows.dtype).weight.T


# ---- settings


def test_one_setting_chooses_between_the_whole_vocabulary_and_the_published_form(tmp_path: Path) -> None:
    ours, published = (config(tmp_path, full_vocabulary=x).preset_in_force.divergence for x in (None, False))
    assert ours == Divergence("jsd", beta=0.5)
    assert published == Divergence("jsd", beta=0.5, support="teacher_top_k", top_k=256, clip=0.05)
    clipped = config(tmp_path, full_vocabulary=True, divergence={"clip": 0.1}).preset_in_force.divergence
    assert clipped == Divergence("jsd", beta=0.5, clip=0.1)
    smaller = config(tmp_path, divergence={"top_k": 16}).preset_in_force.divergence
    assert smaller == Divergence("jsd", beta=0.5, support="teacher_top_k", top_k=16, clip=0.05)
    assert config(tmp_path, preset="opsd").preset_in_force.divergence == Divergence("forward_kl", clip=0.05)


def test_teacher_and_decay_are_the_presets_unless_given(tmp_path: Path) -> None:
    args = config(tmp_path)
    assert (args.teacher, args.ema_decay) == ("ema", 0.995)
    assert config(tmp_path, preset="opsd").teacher == "frozen"
    args = config(tmp_path, preset="vision_opd")
    assert (args.teacher, args.ema_decay) == ("ema", 0.95)
    assert config(tmp_path, preset="vision_opd", teacher="live").teacher == "live"


def test_the_published_schedule_is_the_default(tmp_path: Path) -> None:
    args = SelfDistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1000)
    trainer = SelfDistillationTrainer(tiny_model(0), args, privileged_samples(4), processing_class=tiny_processor())
    trainer.create_optimizer_and_scheduler(1000)
    rates = []
    for _ in range(1001):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == 0 and rates[200] == pytest.approx(1e-5) and max(rates) == rates[200]
    assert rates[600] == pytest.approx((1e-5 + 1e-7) / 2, rel=1e-3) and rates[1000] == pytest.approx(1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "older"}, r"teacher must be one of live, frozen, ema, got 'older'"),
        ({"ema_decay": 1.0}, r"The decay of teacher must be in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"The decay of teacher must be in \[0, 1\), got -0.1"),
        ({"preset": "gkd"}, r"preset must be one with privileged context .*, got 'gkd'"),
        ({"preset": "visual_opds"}, r"did you mean 'visual_opsd'"),
        ({"privileged_mode": "both"}, r"privileged_mode must be 'add' or 'replace', got 'both'"),
        ({"privileged_control": "black"}, r"privileged_control must be None or 'noise', got 'black'"),
        ({"teacher_offload": True}, r"teacher_offload must be False"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_data_without_privileged_context_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    needs = r"preset='visual_opsd' needs privileged context in {}: at least one of the columns privileged_images, .*"
    missing = str(tmp_path / "no such model")
    with pytest.raises(ValueError, match=needs.format("train_dataset") + "its columns are prompt, images, answer"):
        SelfDistillationTrainer(missing, config(tmp_path), tiny_samples(4))
    with pytest.raises(ValueError, match=needs.format("eval_dataset")):
        SelfDistillationTrainer(missing, config(tmp_path), privileged_samples(4), tiny_samples(4))
    notes = [{**sample, "privileged_text": "red"} for sample in tiny_samples(4)]
    with pytest.raises(ValueError, match=r"privileged_control='noise' needs the column privileged_images in train"):
        SelfDistillationTrainer(missing, config(tmp_path, privileged_control="noise"), notes)


def test_more_top_k_than_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"top_k=256 likeliest tokens, but the vocabulary has"):
        make_self_trainer(tmp_path, full_vocabulary=False)


# ---- a step


@pytest.mark.parametrize("preset", ["visual_opsd", "opsd", "vision_opd"])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_the_loss_is_the_divergence_to_the_model_that_sees_more(tmp_path: Path, preset: str, mode: str) -> None:
    knobs = {"top_k": 9} if preset == "vision_opd" else None
    trainer = make_self_trainer(tmp_path, preset=preset, privileged_mode=mode, divergence=knobs, loss_reduction="token")
    batch = batch_of(trainer)
    samples = list(trainer.train_dataset)[:4]
    seen = [
        {"prompt": x["prompt"], "images": (x["images"] if mode == "add" else []) + x["privileged_images"]}
        for x in samples
    ]
    answers = [[ids.tolist() for ids in group.responses] for group in batch["groups"]]
    plain, privileged = (
        encode_groups(trainer.processing_class, part, answers, trainer.placeholder_ids) for part in (samples, seen)
    )
    with torch.no_grad():
        s, t = (logits(trainer.model, groups).double() for groups in (plain, privileged))
    expected = divergence_reference(s, [(1.0, t)], trainer.args.preset_in_force.divergence, None)
    actual = trainer.compute_loss(trainer.model, batch)
    assert expected.mean() > 1e-3
    torch.testing.assert_close(actual.detach().double(), expected.mean(), rtol=1e-5, atol=1e-7)
    actual.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trainer.model.parameters())
    assert trainer.model.training


def test_the_teacher_gets_no_gradient(tmp_path: Path) -> None:
    """The gradient is that of the divergence to a constant, also through a tied head."""
    trainer = make_self_trainer(tmp_path, teacher="live", loss_reduction="token")
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model, batch).backward()
    actual = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    view = trainer.further_views(list(trainer.train_dataset)[:4], batch["groups"])["privileged"]
    with torch.no_grad():
        target = logits(trainer.model, view).detach()
    divergence_reference(
        logits(trainer.model, batch["groups"]), [(1.0, target)], Divergence("jsd", beta=0.5), None
    ).mean().backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_student_sees_the_question_alone(tmp_path: Path) -> None:
    trainer = make_self_trainer(tmp_path, num_generations=2)
    inputs = [sample for sample in list(trainer.train_dataset)[:2] for _ in range(2)]
    trainer.model.train()
    batch = trainer.sample(inputs)
    alone = encode_groups(trainer.processing_class, tiny_samples(2), [(), ()], trainer.placeholder_ids)
    for group, view, plain in zip(batch["groups"], batch["views"]["privileged"], alone, strict=True):
        assert torch.equal(group.prompt_ids, plain.prompt_ids)
        assert len(view.prompt_ids) == len(group.prompt_ids) + 4 + 2, "one more picture of four tokens, and its marks"
        assert all(one is other for one, other in zip(view.responses, group.responses, strict=True))


def test_num_generations_share_one_privileged_prompt(tmp_path: Path) -> None:
    trainer = make_self_trainer(tmp_path, num_generations=2, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["divergence"] > 0


def test_without_privileged_context_in_a_row_nothing_is_learned(tmp_path: Path) -> None:
    samples = [{**sample, "privileged_images": None} for sample in tiny_samples(8)]
    trainer = make_self_trainer(tmp_path, samples=samples, teacher="live", max_steps=1, optim="sgd", max_grad_norm=0.0)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0, abs=1e-6)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-5)


# ---- teachers over steps


def weights(trainer: SelfDistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_an_averaged_teacher_follows_the_weights_of_a_run(tmp_path: Path) -> None:
    """Against a plain loop in float64 over the weights after each step."""
    trainer = make_self_trainer(tmp_path, teacher="ema", ema_decay=0.9, max_steps=3)
    visited = []
    step = trainer.copy.update
    trainer.copy.update = lambda model: (visited.append(weights(trainer)), step(model))
    average = {name: x.double() for name, x in weights(trainer).items()}
    trainer.train()
    assert len(visited) == 3
    for current in visited:
        average = {name: 0.9 * x + 0.1 * current[name].double() for name, x in average.items()}
    after = weights(trainer)
    with trainer.copy.in_place(trainer.model):
        for name, x in weights(trainer).items():
            torch.testing.assert_close(x.double(), average[name], rtol=1e-5, atol=1e-7)
            assert not torch.equal(x, after[name]) or x.abs().max() == 0
    assert differences(weights(trainer), after) == []


@pytest.mark.parametrize("teacher", ["live", "frozen", "ema"])
def test_what_each_teacher_is(tmp_path: Path, teacher: str) -> None:
    trainer = make_self_trainer(tmp_path, teacher=teacher, max_steps=2)
    start = weights(trainer)
    trainer.train()
    with trainer.copy.in_place(trainer.model):
        held = weights(trainer)
    expected = {"live": weights(trainer), "frozen": start}.get(teacher)
    if expected is not None:
        assert differences(held, expected) == []
    assert (differences(held, start) == []) == (teacher == "frozen")


def test_a_frozen_teacher_under_lora_is_the_base(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    trainer = make_self_trainer(tmp_path, teacher="frozen", max_steps=2, peft_config=lora)
    trainer.train()
    assert not trainer.copy.taken
    batch = batch_of(trainer)
    view = trainer.further_views(list(trainer.train_dataset)[:4], batch["groups"])["privileged"]
    with torch.no_grad():
        (expected,) = score_groups(tiny_model(0).eval(), view, text=False)
        (own,) = score_groups(trainer.model.eval(), view, text=False)
    rows = torch.cat([entry.rows["privileged"] for entry in batch["teacher"]])
    assert torch.equal(rows, expected) and not torch.equal(rows, own)


def test_an_average_under_lora_holds_the_adapter_alone(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = make_self_trainer(tmp_path, teacher="ema", ema_decay=0.5, max_steps=2, peft_config=lora)
    start = weights(trainer)
    trainer.train()
    moved = weights(trainer)
    with trainer.copy.in_place(trainer.model):
        held = weights(trainer)
    for name, x in held.items():
        if "lora_B" in name:
            assert x.abs().max() > 0 and not torch.equal(x, moved[name])
        elif "lora_" not in name:
            assert torch.equal(x, start[name])
    assert sum(x.numel() for x in trainer.copy._kept.values()) == sum(
        p.numel() for p in trainer.model.parameters() if p.requires_grad
    )


@pytest.mark.parametrize("sharded", [True, False])
def test_the_teacher_runs_in_the_engine_that_the_student_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    trainer = make_self_trainer(tmp_path)
    assert trainer.step_scorer.teachers[""].model is trainer.model
    monkeypatch.setattr(type(trainer.step_scorer), "sharded", sharded)
    trainer.model_wrapped = torch.nn.Sequential(trainer.model)
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.step_scorer.teachers[""].model is (trainer.model_wrapped if sharded else trainer.model)
    assert trainer.copy.taken


# ---- resuming


@pytest.mark.parametrize(
    ("teacher", "lora"), [pytest.param("ema", False, marks=pytest.mark.slow), ("frozen", False), ("ema", True)]
)
@pytest.mark.slow
def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path: Path, teacher: str, lora: bool) -> None:
    """Bit for bit, with the teacher that the run had and not the resumed student."""
    options = {
        "teacher": teacher,
        "ema_decay": 0.9,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
    }
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    whole = make_self_trainer(tmp_path, **options)
    whole.train()
    again = make_self_trainer(tmp_path, **options)
    torch.rand(3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differences(weights(again), weights(whole)) == []
    for trainer in (again, whole):
        with trainer.copy.in_place(trainer.model):
            trainer.held = weights(trainer)
    assert differences(again.held, whole.held) == []
    assert differences(whole.held, weights(whole)) != []
    logs = [[(x["step"], x.get("loss"), x.get("eval_loss")) for x in t.state.log_history] for t in (again, whole)]
    assert logs[0] == logs[1]


def test_a_checkpoint_of_another_teacher_cannot_be_resumed(tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    make_self_trainer(tmp_path, teacher="frozen", **options).train()
    other = make_self_trainer(tmp_path, teacher="ema", **options)
    with pytest.raises(ValueError, match=r"holds the weights of teacher='frozen', expected 'ema'"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    make_self_trainer(tmp_path / "live", teacher="live", **options).train()
    other = make_self_trainer(tmp_path / "live", teacher="ema", **options)
    with pytest.raises(ValueError, match=r"checkpoint-1 has no student_copy.safetensors: teacher='ema' cannot be"):
        other.train(resume_from_checkpoint=str(tmp_path / "live" / "checkpoint-1"))
