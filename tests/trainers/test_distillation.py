"""VGSTrainer on tiny random Qwen3-VL pairs: what one step computes, measures and logs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import trl
from tiny import plain_rows, tiny_model, tiny_processor, tiny_samples, trainer_options
from torch.nn.functional import pad
from trainers import loss_and_gradients, loss_of, make_trainer, rollout, scripted_run

import vgs.objectives.definitions
import vgs.trainers.micro_batch
from vgs import VGSConfig, VGSTrainer
from vgs.models.groups import PromptGroup
from vgs.models.padding import pad_prompts
from vgs.objectives.eta import gradient_norm
from vgs.trainers.rollouts import encode_questions


def responses_of(batch: dict) -> list[list[int]]:
    return [response.tolist() for group in batch["groups"] for response in group.responses]


def four_rows(trainer: VGSTrainer, batch: dict, index: int) -> list[torch.Tensor]:
    """Student and teacher log-probs, float64, of response ``index`` in both views: one plain forward each."""
    response = responses_of(batch)[index]
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
    settings = {"loss_reduction": reduction, "gradient_accumulation_steps": 1, "gamma_guard": False}
    trainer = make_trainer(tmp_path, lam=0.5, eta=0.41, **settings)
    batch = rollout(trainer)
    lengths = [len(response) for response in responses_of(batch)]
    assert len(set(lengths)) > 1, "responses of different lengths"
    assert batch["num_items_in_batch"] == (8 if reduction == "trajectory" else sum(lengths))
    loss = loss_of(trainer, batch)
    assert loss.requires_grad
    assert trainer._metrics["train"]["entropy"][-1] > 0
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
    for name in (*vgs.trainers.micro_batch.TERMS, "entropy", "vds_q40", "vds_q70", "accuracy", "loss"):
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
    original = vgs.objectives.definitions.fused_loss

    def spy(student_rows, teacher_rows, *arguments, **options):
        autocast.add(torch.is_autocast_enabled("cpu"))
        return original(student_rows, teacher_rows, *arguments, **options)

    monkeypatch.setattr(vgs.objectives.definitions, "fused_loss", spy)
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
    trainer.model.train()
    questions = encode_questions(trainer, list(trainer.train_dataset), 1)
    host = trainer.host_rollout(questions)
    groups = questions.answered(host["completion_ids"], host["completion_mask"])
    _, _, fields = pad_prompts(questions.rows, 0)
    kinds = fields.pop("mm_token_type_ids")
    host |= {**fields, "mm_token_type_ids": pad(kinds, (0, host["completion_ids"].shape[1]))}
    batch = trainer.with_teacher({"groups": groups, "num_items_in_batch": host["num_items_in_batch"]})
    loss = loss_of(trainer, batch)
    theirs = trl.DistillationTrainer._compute_loss(trainer, trainer.model, host, host["num_items_in_batch"])
    entropy = (theirs[1] / theirs[2]).item()
    assert (loss.item(), trainer._metrics["train"]["entropy"][-1]) == pytest.approx(
        (theirs[0].item(), entropy), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"lam": 0.01}, [("teacher", 2, False), ("student", 2, True)]),
        ({"lam": 0.0}, [("teacher", 2, False), ("student", 1, True), ("student", 1, False)]),
        ({"lam": 0.0, "detach_prior": False}, [("teacher", 2, False), ("student", 2, True)]),
        ({"lam": 0.0, "gamma": 0.0, "log_terms": False}, [("teacher", 1, False), ("student", 1, True)]),
    ],
)
def test_forwards_of_a_step(tmp_path: Path, options: dict, calls: list) -> None:
    """(model, views in the row, gradient?) of the backbones' forwards."""
    # Every response has gated tokens, whatever it is.
    settings = {"eta": 1.0, "vds_scope": "trajectory", "vds_quantile": 0.0, "per_device_train_batch_size": 8}
    settings["gamma_guard"] = False  # it would begin with gamma 0
    trainer, seen = make_trainer(tmp_path, **settings, **options), []
    samples = [sample for sample in trainer.train_dataset if sample["images"][0].width == 32]
    for name, model in (("student", trainer.model), ("teacher", trainer.teacher_model)):
        model.base_model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.append((name, kwargs["input_ids"], torch.is_grad_enabled())),
            with_kwargs=True,
        )
    trainer.model.train()
    trainer._generate_single_turn = lambda prompts, *_: [[20, 21, 1] for _ in prompts]
    batch = trainer.with_teacher(trainer.sample(samples))
    loss_of(trainer, batch)
    text = sum(len(group.text_prompt_ids) + 2 for group in batch["groups"])
    image = sum(len(group.prompt_ids) + 2 for group in batch["groups"])
    views = {image: 1, text: 1, image + text: 2}
    assert [(name, views[ids.shape[1]], grad) for name, ids, grad in seen] == calls


def test_text_rows_without_gated_tokens_need_no_gradient(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eta=1.0, lam=0.5, vds_quantile=0.9, max_tokens_per_pass=10_000)
    batch = rollout(trainer)
    planned = trainer.plan_passes(batch, 1.0, trainer.objective, terms=False)
    vds = torch.cat([entry.vds for entry in batch["teacher"]])
    opened = [bool((entry.vds > torch.quantile(vds, 0.9)).any()) for entry in batch["teacher"]]
    assert planned.text_gradient == opened
    assert 0 < sum(opened) < len(opened)


@pytest.mark.parametrize(
    "options",
    [
        {"lam": 0.5},
        {"lam": 0.5, "schedule": "adaptive", "loss_reduction": "token"},
        {"lam": 0.5, "vds_scope": "trajectory", "detach_prior": False},
        {"lam": 0.0, "log_terms": False},
    ],
)
def test_the_loss_is_the_same_however_it_is_split(tmp_path: Path, options: dict) -> None:
    """One pass; passes of at most 110 tokens; prompts shared or repeated."""
    sizes = {"num_generations": 2, "per_device_train_batch_size": 8}
    trainer = make_trainer(tmp_path, eta=0.5, gamma_guard=False, **sizes, **options)
    trainer.model.train()
    doubled = [sample for sample in trainer.train_dataset[:4] for _ in range(2)]
    batch = trainer.with_teacher(trainer.sample(doubled))
    assert [len(group.responses) for group in batch["groups"]] == [2] * 4
    results, passes = [], []
    for budget, share in ((None, True), (10_000, True), (110, True), (110, False)):
        trainer.args.max_tokens_per_pass, trainer.args.share_prefix = budget, share
        scored = trainer.with_teacher(batch)
        results.append(loss_and_gradients(trainer, scored))
        passes.append(len(trainer.plan_passes(scored, 1.0, trainer.objective, terms=False).passes))
    assert passes[0] == passes[1] == 1 < passes[2] < passes[3]
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, expected in results[0][1].items():
            scale = max(expected.abs().max().item(), 1e-3)
            torch.testing.assert_close(gradient[name], expected, rtol=0, atol=1e-5 * scale, msg=name)


def test_language_preservation_every_third_step(tmp_path: Path) -> None:
    """A third as often, three times as strong; evaluation takes the objective as it is."""
    trainer = make_trainer(tmp_path, eta=1.0, lam=0.25, lp_every=3, max_steps=4)
    seen = []
    original = trainer.plan_passes

    def spy(inputs, num_items, objective, terms):
        seen.append((trainer.model.training, objective.lam))
        return original(inputs, num_items, objective, terms)

    trainer.plan_passes = spy
    trainer.train()
    assert seen == [(True, 0.75), (True, 0.0), (True, 0.0), (True, 0.75)]
    seen.clear()
    trainer.evaluate()
    assert set(seen) == {(False, 0.25)}


def test_an_offloaded_teacher_says_the_same(tmp_path: Path) -> None:
    options = {"eta": 1.0, "lam": 0.5, "max_tokens_per_pass": 10_000}
    trainer = make_trainer(tmp_path, **options)
    away = make_trainer(tmp_path, teacher_offload=True, **options)
    batch = rollout(trainer)
    layer = away.teacher_model.model.language_model.layers[0].mlp.up_proj
    head, at_rest, during = away.teacher_model.lm_head.weight.data_ptr(), layer.weight.data_ptr(), []
    layer.register_forward_pre_hook(lambda module, args: during.append(module.weight.data_ptr()))
    for ours, theirs in zip(away.with_teacher(batch)["teacher"], batch["teacher"], strict=True):
        assert torch.equal(ours.rows["image"], theirs.rows["image"])
        assert torch.equal(ours.vds, theirs.vds)
    assert during != [at_rest], "the pass ran on a copy"
    assert layer.weight.data_ptr() == at_rest
    assert away.teacher_model.lm_head.weight.data_ptr() == head


def test_loss_without_terms_has_the_same_gradient(tmp_path: Path) -> None:
    gradients = []
    for log_terms in (True, False):
        trainer = make_trainer(tmp_path, lam=0.0, eta=0.5, log_terms=log_terms, gamma_guard=False)
        loss_of(trainer, rollout(trainer)).backward()
        gradients.append(trainer.model.model.language_model.embed_tokens.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def logits(trainer: VGSTrainer, group: PromptGroup, response: torch.Tensor) -> list[torch.Tensor]:
    """[T, V] each: student and teacher, with and without the image, from the whole models' plain forwards."""
    rows = []
    for model in (trainer.model, trainer.teacher_model):
        for prompt, images in ((group.prompt_ids, group.images), (group.text_prompt_ids, {})):
            ids = torch.cat([prompt, response])[None]
            fields = {name: x for name, x in images.items() if name != "mm_token_type_ids"}
            if images:
                kinds = images["mm_token_type_ids"]
                fields["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(response)))[None]
            found = model(input_ids=ids, attention_mask=torch.ones_like(ids), **fields).logits
            rows.append(found[0, -len(response) - 1 : -1])
    return rows


def test_measured_eta_equals_the_ratio_by_hand(tmp_path: Path) -> None:
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "gamma_guard": False}
    trainer = make_trainer(tmp_path, max_steps=1, eta="measure", **settings)
    batches: list[dict] = []
    original = trainer.measure_eta

    def spy(micro_batches: list[dict]) -> None:
        batches.extend(micro_batches)
        original(micro_batches)

    trainer.measure_eta = spy
    trainer.train()
    assert len(batches) == 2
    norms = []
    for gamma in (0.0, 2.0):
        trainer.model.zero_grad()
        for batch in batches:
            for group in batch["groups"]:
                for response in group.responses:
                    s, a, t, w = (x.log_softmax(dim=-1) for x in logits(trainer, group, response))
                    target = (a.detach() + t - w).log_softmax(dim=-1).detach()
                    (kl(s, t.detach()) + gamma * kl(s, target)).mean().backward()
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


def assert_same_weights(actual: dict, expected: dict, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    start = tiny_model(0).state_dict()
    moved = max((expected[name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3, "the run must have changed something"
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("reduction", ["trajectory", "token"])
def test_accumulation_1x4_equals_4x1(tmp_path: Path, reduction: str) -> None:
    options = {"loss_reduction": reduction, "vds_scope": "trajectory", "eta": "measure"}
    whole, split = (scripted_run(tmp_path, batch, steps, **options) for batch, steps in ((4, 1), (1, 4)))
    assert split.steering.ratios == pytest.approx(whole.steering.ratios, rel=1e-4)
    assert_same_weights(split.model.state_dict(), whole.model.state_dict())
