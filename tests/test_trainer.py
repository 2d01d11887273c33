"""VGSTrainer on tiny random Qwen3-VL pairs: what one step computes, samples, measures and refuses."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
import trl
from tiny import plain_rows, tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import make_trainer, rollout

import vgs.trainer
from vgs import VGSConfig, VGSTrainer
from vgs.pairing import pair_views
from vgs.steering import SteeringState, gradient_norm


def four_rows(trainer: VGSTrainer, batch: dict, index: int) -> list[torch.Tensor]:
    """Student and teacher log-probs, float64, of response ``index`` in both views: one plain forward each."""
    response = batch["completion_ids"][index][batch["completion_mask"][index].bool()].tolist()
    sample, rows = trainer.train_dataset[index], []
    for model in (trainer.model.double(), trainer.teacher_model.double()):
        for with_image in (True, False):
            hidden = plain_rows(model, trainer.processing_class, sample, response, with_image)
            rows.append((hidden @ model.lm_head.weight.T).log_softmax(dim=-1))
        model.float()
    return rows


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(dim=-1)


def direct_loss(trainer: VGSTrainer, batch: dict) -> float:
    """The objective's definition in float64, from separately computed logits."""
    args, tokens = trainer.args, []
    with torch.no_grad():
        for index in range(len(trainer.train_dataset)):
            s, a, t, w = four_rows(trainer, batch, index)
            target = (a + t - w).log_softmax(dim=-1)
            tokens.append(torch.stack([kl(s, t), kl(s, target), kl(a, w), kl(t, w)]))
    threshold = torch.quantile(torch.cat(tokens, dim=1)[3], args.vds_quantile)
    per_token = [x[0] + args.gamma * x[1] + args.lam * (x[3] > threshold) * x[2] for x in tokens]
    if args.loss_reduction == "token":
        mean = torch.cat(per_token).mean()
    else:
        mean = torch.stack([x.mean() for x in per_token]).mean()
    return (trainer.objective.eta * mean).item()


@pytest.mark.parametrize("reduction", ["trajectory", "token"])
def test_one_steps_loss_equals_the_definition(tmp_path: Path, reduction: str) -> None:
    trainer = make_trainer(tmp_path, lam=0.5, eta=0.41, loss_reduction=reduction, gradient_accumulation_steps=1)
    batch = rollout(trainer)
    assert len(set(batch["completion_mask"].sum(dim=1).tolist())) > 1, "responses of different lengths"
    count = batch["num_items_in_batch"]
    assert count == (8 if reduction == "trajectory" else batch["completion_mask"].sum())
    loss, entropy, tokens = trainer._compute_loss(trainer.model, batch, count)
    assert loss.requires_grad
    assert tokens == batch["completion_mask"].sum()
    assert entropy > 0
    assert loss.item() == pytest.approx(direct_loss(trainer, batch), rel=1e-5)


def test_training_moves_the_weights_and_logs_the_terms(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, eta="paper-2b", learning_rate=1e-3)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    frozen = {name: p.detach().clone() for name, p in trainer.teacher_model.named_parameters()}
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])]
    assert any("visual" in name for name in moved)
    assert any("language_model" in name for name in moved)
    assert all(torch.equal(p, frozen[name]) and p.grad is None for name, p in trainer.teacher_model.named_parameters())
    logged = trainer.state.log_history[0]
    for name in (*vgs.trainer.TERMS, "entropy", "vds_q40", "vds_q70", "accuracy", "loss"):
        assert math.isfinite(logged[name]), name
    assert logged["eta"] == 0.41
    assert 0 < logged["vds_q40"] <= logged["vds_q70"]
    assert logged["gate"] == pytest.approx(0.3, abs=0.1)


def test_mixed_precision_checkpointing_and_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 adapters under bf16 autocast, a bf16 teacher, activation checkpointing, eta through all of it."""
    peft = pytest.importorskip("peft")
    autocast: set[bool] = set()
    trainer = VGSTrainer(
        model=tiny_model(0),
        teacher_model=tiny_model(1, hidden=48).to(torch.bfloat16),
        args=VGSConfig(**trainer_options(tmp_path, max_steps=2, bf16=True, gradient_checkpointing=True)),
        train_dataset=tiny_samples(8),
        processing_class=tiny_processor(),
        peft_config=peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=2),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    original = vgs.trainer.fused_loss

    def spy(student_rows, teacher_rows, *arguments, **options):
        autocast.add(torch.is_autocast_enabled("cpu"))
        return original(student_rows, teacher_rows, *arguments, **options)

    monkeypatch.setattr(vgs.trainer, "fused_loss", spy)
    trainer.model.base_model.model.base_model.register_forward_pre_hook(
        lambda *_: autocast.add(torch.is_autocast_enabled("cpu") if torch.is_grad_enabled() else True)
    )
    trainer.teacher_model.base_model.register_forward_pre_hook(
        lambda *_: autocast.add(torch.is_autocast_enabled("cpu"))
    )
    trainer.train()
    assert autocast == {True}, "forwards with gradient, the teacher's and the loss all run under autocast"
    moved = {name.split(".")[-3] for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"lora_A", "lora_B"}
    assert len(trainer.steering.ratios) == 1
    assert 0 < trainer.steering.eta < 2
    assert all(math.isfinite(x["loss"]) for x in trainer.state.log_history[:2])


def test_plain_arm_equals_trls_own_distillation(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, gamma=0.0, lam=0.0, eta=1.0, loss_reduction="token", log_terms=False)
    batch = rollout(trainer)
    count = batch["num_items_in_batch"]
    loss, entropy, tokens = trainer._compute_loss(trainer.model, batch, count)
    host = {name: value for name, value in batch.items() if not name.startswith("text_prompt")}
    theirs = trl.DistillationTrainer._compute_loss(trainer, trainer.model, host, count)
    assert (loss.item(), entropy.item()) == pytest.approx((theirs[0].item(), theirs[1].item()), rel=1e-5)
    assert tokens == theirs[2]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"lam": 0.01}, [(16, True), (16, False)]),
        ({"lam": 0.0}, [(8, True), (8, False), (16, False)]),
        ({"lam": 0.0, "detach_prior": False}, [(16, True), (16, False)]),
        ({"lam": 0.0, "gamma": 0.0, "log_terms": False}, [(8, True), (8, False)]),
    ],
)
def test_forwards_of_a_step(tmp_path: Path, options: dict, calls: list) -> None:
    """(rows, gradient?) of the backbones' forwards: the student's, then the teacher's."""
    trainer = make_trainer(tmp_path, eta=1.0, **options)
    batch, seen = rollout(trainer), []
    for model in (trainer.model, trainer.teacher_model):
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((len(kwargs["input_ids"]), torch.is_grad_enabled())),
            with_kwargs=True,
        )
    trainer._compute_loss(trainer.model, batch, batch["num_items_in_batch"])
    assert seen == calls


def test_loss_without_terms_has_the_same_gradient(tmp_path: Path) -> None:
    gradients = []
    for log_terms in (True, False):
        trainer = make_trainer(tmp_path, lam=0.0, eta=0.5, log_terms=log_terms)
        batch = rollout(trainer)
        trainer._compute_loss(trainer.model, batch, batch["num_items_in_batch"])[0].backward()
        gradients.append(trainer.model.model.language_model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_measured_eta_equals_the_ratio_by_hand(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, eta="measure", learning_rate=0.0, gradient_accumulation_steps=2)
    batches: list[dict] = []
    original = trainer._measure_eta

    def spy() -> None:
        batches.extend(trainer._buffered_inputs)
        original()

    trainer._measure_eta = spy
    trainer.train()
    assert len(batches) == 2
    norms = []
    for gamma in (0.0, 2.0):
        trainer.model.zero_grad()
        for batch in batches:
            views = pair_views(
                *[batch[x] for x in ("prompt_ids", "prompt_mask", "text_prompt_ids", "text_prompt_mask")],
                *[batch[x] for x in ("completion_ids", "completion_mask")],
                {name: batch[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")},
            )
            rows = [
                model(input_ids=v.input_ids, attention_mask=v.attention_mask, **v.multimodal).logits
                for model in (trainer.model, trainer.teacher_model)
                for v in (views.multimodal_view(), views.text_view())
            ]
            columns = views.response_mask.shape[1]
            s, a, t, w = (x[:, -columns - 1 : -1].log_softmax(dim=-1) for x in rows)
            target = (a.detach() + t - w).log_softmax(dim=-1).detach()
            per_token = (kl(s, t.detach()) + gamma * kl(s, target)) * views.response_mask
            (per_token.sum(dim=1) / views.response_mask.sum(dim=1)).sum().backward()
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters())))
    assert trainer.steering.ratios == [pytest.approx(norms[0] / norms[1], rel=1e-4)]
    assert trainer.state.log_history[0]["eta"] == trainer.steering.eta != 1.0


def test_gradient_norm_sums_over_losses_and_leaves_grad_alone() -> None:
    x, unused = torch.tensor([3.0, 4.0], requires_grad=True), torch.zeros(2, requires_grad=True)
    losses = (0.5 * x.square().sum() for _ in range(2))
    assert gradient_norm(losses, [x, unused], reduce=lambda g: g / 2) == pytest.approx(5.0)
    assert x.grad is None


def test_eta_without_a_visual_term_needs_no_measurement(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, gamma=0.0, eta="measure")
    trainer.train()
    assert trainer.steering.ratios == []
    assert trainer.objective.eta == 1.0


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (1.0, math.nan), (math.inf, 1.0)])
def test_eta_of_a_vanishing_gradient_is_an_error(norms: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Set eta to a number"):
        SteeringState().add_ratio(*norms)


def observe(language: list[float], student_vds: float) -> int:
    state = SteeringState()
    return sum(state.watch(value, student_vds, vds=1.0) for value in language)


def test_collapse_warning(caplog: pytest.LogCaptureFixture) -> None:
    climbing = [0.8] * 5 + [4.0] * 20
    with caplog.at_level(logging.WARNING):
        assert observe(climbing, student_vds=0.1) == 1, "once"
    assert "language 0.800 -> 4.000" in caplog.text
    assert "Lower gamma" in caplog.text
    assert observe(climbing, student_vds=0.9) == 0, "a student that looks at the image"
    assert observe([0.8] * 30, student_vds=0.1) == 0, "a prior that stays"
    assert observe([0.8] * 5 + [4.0] * 4, student_vds=0.1) == 0, "too early to tell"
