"""The ways to measure eta over a run: in every step, in some of them, and from the last hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resume_worker import build, differences, everything
from tiny import trainer_options
from torch import nn
from trainers import make_trainer, scripted_run

from vgs import VGSConfig
from vgs.models.heads import Head
from vgs.objectives.eta import eta_at, hidden_norms, ratio_from
from vgs.trainers import eta_measurement
from vgs_kernels import VGSObjective, fused_linear_vgs_loss


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_eta_of_a_share_and_back() -> None:
    """Exact at both ends; with gradients of one length and cosine 0.7, near the truth between them."""
    assert (eta_at(0.4, 0.0), eta_at(0.4, 1.0)) == (1.0, 0.4)
    g, h = torch.tensor([1.0, 0.0]), torch.tensor([0.7, 0.51**0.5])
    for share in (0.25, 0.5, 0.75):
        eta = (g.norm() / (g + share * 2.0 * h).norm()).item()
        assert eta_at((g.norm() / (g + 2.0 * h).norm()).item(), share) == pytest.approx(eta, rel=0.04)
        assert eta_at(ratio_from(eta, share), share) == pytest.approx(eta)
    assert ratio_from(4.0, 0.1) == pytest.approx(10.0), "no negative norm"


@pytest.mark.parametrize("eta", ["exact", "cheap"])
def test_the_split_does_not_show(tmp_path: Path, eta: str) -> None:
    """One micro-batch, four, and one in several passes."""
    options = {"vds_scope": "trajectory", "gamma_guard": False, "eta": eta}
    runs = [
        scripted_run(tmp_path, *shape, **options, **more)
        for shape, more in (((8, 1), {}), ((2, 4), {}), ((8, 1), {"max_tokens_per_pass": 60}))
    ]
    expected = logged(runs[0], "eta")
    assert len(set(expected)) == 2 and all(0 < x < 2 for x in expected)
    for run in runs[1:]:
        assert logged(run, "eta") == pytest.approx(expected, rel=1e-4)
        assert run.steering.ratio == pytest.approx(runs[0].steering.ratio, rel=1e-4)


def test_exact_is_measured_anew_in_every_step(tmp_path: Path) -> None:
    """Of the first step what ``measure`` says; then of other weights, and with gamma as it is in force."""
    options = {"gamma_guard": False, "vds_scope": "trajectory"}
    once = scripted_run(tmp_path, 8, 1, eta="measure", **options)
    exact = scripted_run(tmp_path, 8, 1, eta="exact", **options)
    assert logged(exact, "eta")[0] == pytest.approx(once.steering.ratios[0], rel=1e-6)
    risen = make_trainer(tmp_path, eta="exact", gamma_warmup_steps=4, gamma_guard=False, max_steps=3)
    asked, original = [], eta_measurement.gradient_norms

    def spy(trainer, micro_batches, gamma):
        asked.append(gamma)
        norms = original(trainer, micro_batches, gamma)
        assert trainer.steering.ratio is None or gamma == 1.0
        return norms

    eta_measurement.gradient_norms = spy
    try:
        risen.train()
    finally:
        eta_measurement.gradient_norms = original
    assert asked == [0.5, 1.0], "none of gamma 0"
    assert logged(risen, "eta")[0] == 1.0


def test_tracked_is_a_running_mean_of_some_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratios = iter([0.5, 0.4, 0.0, 0.6])  # one cannot be measured
    monkeypatch.setattr(eta_measurement, "gradient_norms", lambda *_: (next(ratios), 1.0))
    trainer = make_trainer(tmp_path, eta="tracked", eta_every=2, max_steps=8, gamma_guard=False)
    trainer.train()
    assert logged(trainer, "eta") == pytest.approx([0.5, 0.5, 0.47, 0.47, 0.47, 0.47, 0.509, 0.509])
    assert logged(trainer, "eta_exact") == pytest.approx([0.5, 0.4, 0.6])
    assert logged(trainer, "eta_error") == pytest.approx([0.5 / 0.4 - 1, 0.47 / 0.6 - 1])
    with pytest.raises(StopIteration):
        next(ratios)


def test_gradients_at_the_hidden_states_are_the_definitions() -> None:
    """Sums over tokens of squared norms, in float64, of weights * standard and of the loss."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    s, a, t, w = normal(7, 5), normal(7, 5), normal(7, 6), normal(7, 6)
    heads = Head(nn.Parameter(normal(11, 5)), nn.Parameter(normal(11)), 0.7, 3.0), Head(normal(11, 6), None, 1.0, None)
    weights = torch.rand(7, generator=generator)
    s.requires_grad_()
    loss = fused_linear_vgs_loss(
        *(s, a, heads[0].weight, t, w, heads[1].weight),
        objective=VGSObjective(eta=0.5, lam=0.0),
        token_weights=weights,
        backend="torch",
        **heads[0].student_options,
    ).loss
    found = hidden_norms(loss, s, heads[0], t, heads[1], 0.5 * weights, backend="torch")
    p, q, own, blind = (head.logits(x).log_softmax(-1) for head, x in zip(heads * 2, (s, t, a, w), strict=True))
    target = (own + q - blind).log_softmax(-1).detach()
    for square, extra in zip(found, (0.0, 2.0), strict=True):
        value = (p.exp() * (p - q)).sum(-1) + extra * (p.exp() * (p - target)).sum(-1)
        (gradient,) = torch.autograd.grad((0.5 * weights * value).sum(), s, retain_graph=True)
        torch.testing.assert_close(square, gradient.square().sum(), rtol=1e-6, atol=0)
    assert heads[0].weight.grad is None and s.grad is None
    loss.backward()
    assert s.grad.square().sum() == pytest.approx(found[1].item(), rel=1e-6), "the loss's graph is still there"


def test_cheap_begins_with_a_guess_and_follows(tmp_path: Path) -> None:
    """Nothing but the loss runs; a step with little of gamma tells nothing."""
    trainer = make_trainer(tmp_path, eta="cheap", max_steps=3, gamma_guard=False)
    trainer.measure_eta = None
    trainer.train()
    assert logged(trainer, "eta")[0] == pytest.approx(1 / 3)
    assert len(set(logged(trainer, "eta"))) == 3
    warming = make_trainer(tmp_path, eta="cheap", max_steps=2, gamma_warmup_steps=8, gamma_guard=False)
    warming.train()
    assert warming.steering.ratio is None


@pytest.mark.parametrize("eta", ["tracked", "cheap"])
def test_a_resumed_run_has_the_same_eta(tmp_path: Path, eta: str) -> None:
    options = {"eta": eta, "eta_every": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 1, "eval_strategy": "no"}
    whole = build(tmp_path, **options)
    whole.train()
    again = build(tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert differences(everything(again), everything(whole)) == []
    assert len(logged(whole, "eta_exact")) == 2


def test_with_a_frozen_prior(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eta="cheap", eta_every=1, prior="frozen", max_steps=2)
    trainer.train()
    assert 0 < trainer.steering.ratio < 2 and logged(trainer, "eta_exact")


def test_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = trainer_options(tmp_path)
    assert VGSConfig(**options, eta="tracked").eta_every == 16
    assert VGSConfig(**options, eta="tracked", gamma=0.0).fixed_eta == 1.0
    assert VGSConfig(**options, eta="tracked", preset="opd").eta_every is None
    VGSConfig(**options, eta=0.3, eta_every=3)
    assert "eta_every=3 is without effect: eta=0.3" in caplog.text
