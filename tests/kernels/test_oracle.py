"""The oracle itself: hand-computed numbers, finite differences, and the published identity as a check from outside."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from oracle import gate_and_gamma, head_logits, kl, steered_target, vgs_from_logits, vgs_oracle
from problems import FAR, INPUTS, NEAR, TRAINABLE, evaluate, make_problem

PAPER = {
    "gamma": 2.0,
    "lam": 0.01,
    "vds_quantile": 0.7,
    "eta": 1.0,
    "temperature": 1.0,
    "detach_prior": True,
    "schedule": "constant",
    "adaptive_quantile": 0.4,
    "vds_scope": "call",
}


def objective(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**PAPER, **changes})


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_kl_by_hand():
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl(log(0.5, 0.5), log(0.25, 0.75)).item() == pytest.approx(expected, rel=1e-14)
    assert kl(log(0.0, 1.0), log(0.0, 1.0)).item() == 0  # 0 * (inf - inf) is 0
    assert kl(log(0.5, 0.5), log(0.0, 1.0)).item() == math.inf


def test_steered_target_by_hand():
    # p_x q_I / q_x = (1/4 * 1/2 * 3, 3/4 * 1/2 * 3/2) = (3/8, 9/16), normalised (2/5, 3/5)
    target = steered_target(log(1 / 4, 3 / 4), log(1 / 2, 1 / 2), log(1 / 3, 2 / 3))
    torch.testing.assert_close(target.exp(), torch.tensor([[0.4, 0.6]], dtype=torch.float64))


@pytest.mark.parametrize("excluded", [0, 1, 2])
def test_steered_target_gives_no_mass_to_an_excluded_column(excluded):
    rows = [log(0.25, 0.25, 0.5) for _ in range(3)]
    rows[excluded] = log(0.0, 0.5, 0.5)
    target = steered_target(*rows).exp()
    assert target[0, 0] == 0
    assert target.sum().item() == pytest.approx(1)


def test_gate_and_adaptive_gamma_by_hand():
    vds = torch.arange(11, dtype=torch.float64)  # quantiles 0.4 and 0.7 are exactly 4 and 7
    gate, gamma = gate_and_gamma(vds, objective(schedule="adaptive"), None, None, None)
    assert gamma.tolist() == [0.0] * 5 + [1.0] * 3 + [2.0] * 3
    assert gate.tolist() == [False] * 8 + [True] * 3


def test_loss_by_hand():
    rows = [log(0.7, 0.3), log(1 / 4, 3 / 4), log(1 / 2, 1 / 2), log(1 / 3, 2 / 3)]
    standard, visual, language = kl(rows[0], rows[2]), kl(rows[0], log(0.4, 0.6)), kl(rows[1], rows[3])
    out = vgs_from_logits(*rows, objective=objective(eta=0.41, lam=0.1), vds_threshold=0.0)
    expected = 0.41 * (standard + 2 * visual + 0.1 * language)
    torch.testing.assert_close(out.loss, expected.squeeze())
    assert out.gate.item()
    assert not vgs_from_logits(*rows, objective=objective()).gate.item()


def test_head_logits_applies_scale_then_softcap_then_temperature():
    hidden, weight, bias = torch.ones(1, 2).double(), torch.tensor([[1.0, 2.0]]).double(), torch.ones(1).double()
    logits = head_logits(hidden, weight, bias, softcap=5.0, logit_scale=0.5, temperature=2.0)
    assert logits.item() == pytest.approx(5 * math.tanh(0.5 * 4 / 5) / 2)


def test_gradient_by_finite_differences():
    problem = make_problem(5, 11, 4, 5, bias=True, dtype=torch.float64)
    leaves = problem.leaves()

    def loss(*trainable: torch.Tensor) -> torch.Tensor:
        values = dict(zip(TRAINABLE, trainable, strict=True))
        bias = {"student_bias": values.pop("student_bias"), "teacher_bias": problem.teacher_bias}
        args = [values.get(name, value) for name, value in zip(INPUTS, problem.args(), strict=True)]
        setting = objective(detach_prior=False, lam=0.5, temperature=1.3)
        return vgs_oracle(*args, objective=setting, student_softcap=30.0, **bias).loss

    assert torch.autograd.gradcheck(loss, [getattr(leaves, name) for name in TRAINABLE])


@pytest.mark.parametrize("gap", [FAR, NEAR])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 4.0])
def test_identity_of_the_composed_target(gamma, gap):
    """std + gamma vis = (1 + gamma) KL(p || softmax(t + kappa (a - w))) + a constant without gradient."""
    problem = make_problem(9, 57, gap=gap, dtype=torch.float64)
    ours = evaluate(vgs_oracle, problem, objective=objective(gamma=gamma, lam=0.0), requires_grad=["student_hidden"])
    hidden = problem.student_hidden.clone().requires_grad_()
    student, teacher = problem.student_weight, problem.teacher_weight
    prior = problem.student_text_hidden @ student.T - problem.teacher_text_hidden @ teacher.T
    target = problem.teacher_hidden @ teacher.T + gamma / (1 + gamma) * prior
    divergence = (1 + gamma) * kl((hidden @ student.T).log_softmax(-1), target.log_softmax(-1)).mean()
    divergence.backward()
    torch.testing.assert_close(ours.gradients["student_hidden"], hidden.grad, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("tokens", "vocab"), [(65, 257), (65, 4099)])
@pytest.mark.parametrize("gap", [FAR, NEAR])
def test_inputs_are_realistic(tokens, vocab, gap):
    problem = make_problem(tokens, vocab, gap=gap, dtype=torch.float64)
    for hidden, weight in (
        (problem.student_hidden, problem.student_weight),
        (problem.teacher_hidden, problem.teacher_weight),
    ):
        logits = hidden @ weight.T
        top = logits.softmax(-1).amax(-1)
        assert logits.std(-1).min() > 2
        assert logits.std(-1).max() < 12
        assert ((top > 0.25) & (top < 0.9999)).double().mean() > 0.9
    terms = vgs_oracle(*problem.args(), objective=objective())
    typical = terms.standard.median().item()
    assert 0.05 < typical < 2 if gap == FAR else 1e-6 < typical < 1e-3
    assert terms.vds.quantile(0.9) > 10 * terms.vds.median()  # few tokens depend on the image, those do strongly
