"""Steering with a frozen or averaged prior: the definition, the trainer, splits and resumed runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from preset_cases import TOKENS, VOCABULARY, Case, kl, softmax
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options
from torch import Tensor
from trainers import ScriptedTrainer, make_trainer, rollout

from vgs import VGSConfig, VGSTrainer
from vgs.models.heads import Head
from vgs.objectives.fixed_prior import anchored
from vgs.objectives.presets import PRESETS
from vgs.trainers.micro_batch import TERMS
from vgs.trainers.passes import backward
from vgs_kernels import VGSObjective


@pytest.mark.parametrize("terms", [True, False])
@pytest.mark.parametrize("lam", [0.0, 0.3])
@pytest.mark.parametrize("schedule", ["constant", "adaptive"])
def test_gradients_are_those_of_the_papers_terms(schedule: str, lam: float, terms: bool) -> None:
    """KL(p_I || q) + gamma * KL(p_I || q*) + lam * gated KL(p_x || q_x), q* of a prior with its own weights."""
    case, generator = Case("realistic"), torch.Generator().manual_seed(7)
    head = Head(torch.randn(VOCABULARY, 16, generator=generator, dtype=torch.float64), None, 1.0, None)
    rows = torch.randn(TOKENS, 16, generator=generator, dtype=torch.float64)
    p, own = (softmax(case.logits("student", view)) for view in ("image", "text"))
    q, blind = (softmax(case.logits("teacher", view)) for view in ("image", "text"))
    target = softmax(rows @ head.weight.T) * q / blind
    target = target / target.sum(-1, keepdim=True)
    vds = kl(q, blind)
    low, high = torch.quantile(vds, 0.4), torch.quantile(vds, 0.7)
    gamma = torch.full_like(vds, 2.0)
    if schedule == "adaptive":
        gamma = torch.where(vds <= low, 0.0, torch.where(vds <= high, 1.0, 2.0)).double()
    values = kl(p, q) + gamma * kl(p, target) + lam * (vds > high) * kl(own, blind)
    expected = 0.7 * (case.weights * values).sum()
    preset = anchored(PRESETS["vgs"]).configured(1.0)
    objective = VGSObjective(lam=lam, eta=0.7, schedule=schedule)
    student = {"image": case.rows["image"], **({"text": case.rows["text"]} if lam or terms else {})}
    teacher = {view: case.teacher_rows[view] for view in ("image", "text")}
    output = preset.loss(
        student,
        {**teacher, "prior": rows},
        case.student,
        case.teacher,
        objective=objective,
        token_weights=case.weights,
        prior_head=head,
        return_terms=terms,
        vds=vds if preset.needs_vds(objective, split=False) else None,
        backend="torch",
    )
    if terms:  # the value too, and every term of every token
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        named = {"standard": kl(p, q), "visual": kl(p, target), "language": kl(own, blind), "student_vds": kl(p, own)}
        for name, values in {**named, "vds": vds}.items():
            torch.testing.assert_close(getattr(output, name), values.detach(), rtol=1e-6, atol=1e-9, msg=name)
    ours, theirs = case.gradients(output.loss), case.gradients(expected)
    assert (theirs["text"].abs().max() > 0) == (lam > 0)
    for part, gradient in theirs.items():
        scale = max(gradient.abs().max().item(), 1e-9)
        torch.testing.assert_close(ours[part], gradient, rtol=0, atol=1e-7 * scale, msg=part)
    if lam:
        torch.testing.assert_close(output.language, kl(own, blind).detach())


def gradients(trainer: VGSTrainer, batch: dict) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    backward(trainer.accelerator, trainer.compute_loss(trainer.model, trainer.with_teacher(batch)))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(expected.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("prior", ["frozen", "ema"])
@pytest.mark.parametrize("options", [{"lam": 0.5}, {"lam": 0.5, "preset": "vgs_adaptive"}, {"lam": 0.0}])
def test_the_first_step_is_the_live_priors(tmp_path: Path, prior: str, options: dict) -> None:
    """And the split of a batch does not show."""
    live = make_trainer(tmp_path, eta=0.5, per_device_train_batch_size=8, gamma_guard=False, **options)
    live.model.train()
    batch = live.sample(list(live.train_dataset))
    expected = gradients(live, batch)
    kept = make_trainer(tmp_path, eta=0.5, per_device_train_batch_size=8, prior=prior, **options)
    kept.model.train()
    kept.prior.copy.take(kept.model)
    assert_equal(gradients(kept, batch), expected)
    kept.args.max_tokens_per_pass = 60
    assert_equal(gradients(kept, batch), expected)


def test_later_steps_are_not(tmp_path: Path) -> None:
    """A student that has moved: the prior is the first one's, whatever the student says."""
    trainer = make_trainer(tmp_path, eta=0.5, prior="frozen", per_device_train_batch_size=8)
    trainer.model.train()
    batch = trainer.sample(list(trainer.train_dataset))
    trainer.prior.copy.take(trainer.model)
    before = [entry.rows["prior"] for entry in trainer.with_teacher(batch)["teacher"]]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    scored = trainer.with_teacher(batch)["teacher"]
    assert all(torch.equal(entry.rows["prior"], x) for entry, x in zip(scored, before, strict=True))
    trainer.prior.copy.source = "live"
    trainer.prior.copy._kept = None
    moved = trainer.with_teacher(batch)["teacher"]
    assert not any(torch.allclose(entry.rows["prior"], x, atol=1e-3) for entry, x in zip(moved, before, strict=True))


def run(folder: Path, prior: str, resume: str | None = None, **options) -> VGSTrainer:
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eta": 0.5, "lam": 0.5, "prior_decay": 0.9}
    trainer = ScriptedTrainer(
        model=tiny_model(0),
        teacher_model=tiny_model(1, hidden=48),
        args=VGSConfig(**trainer_options(folder, prior=prior, **args, **options)),
        train_dataset=tiny_samples(8),
        processing_class=tiny_processor(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("prior", ["frozen", "ema"])
@pytest.mark.slow
def test_a_run_and_its_resumption(tmp_path: Path, prior: str) -> None:
    whole, live = run(tmp_path, prior), run(tmp_path / "live", "live", gamma_guard=False)
    again = run(tmp_path, prior, resume=str(tmp_path / "checkpoint-2"))
    weights = [dict(trainer.model.named_parameters()) for trainer in (whole, again, live)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    logged = [entry for entry in whole.state.log_history if "entropy" in entry]
    assert {*TERMS, "sight", "vds_q70"} <= set(logged[0])
    assert whole.steering.state() == again.steering.state() and len(whole.steering.language_start) == 4
    apart = [entry for entry in live.state.log_history if "entropy" in entry]
    for name in (*TERMS, "loss"):
        assert logged[0][name] == pytest.approx(apart[0][name], rel=1e-4), "in the first step both priors are one"


def test_it_is_watched_without_the_log_of_terms_no_more(tmp_path: Path) -> None:
    trainer = run(tmp_path, "frozen", log_terms=False)
    logged = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert not {"visual", "student_vds"} & set(logged[0]) and not trainer.steering.language_start


def test_eta_is_measured_with_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eta="measure", prior="frozen", max_steps=1)
    trainer.train()
    assert 0 < trainer.steering.eta < 2


def test_without_a_visual_term_it_is_not_asked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eta=0.5, prior="frozen", gamma=0.0, lam=0.5)
    assert not any("prior" in entry.rows for entry in rollout(trainer)["teacher"])
