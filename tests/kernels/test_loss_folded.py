"""``return_terms=False``: the teacher's two projections folded into one give the same gradients."""

from __future__ import annotations

import pytest
import torch
from loss_checks import weights
from oracle import divergence_oracle, vgs_oracle
from problems import TRAINABLE, assert_gradients_close, evaluate, float32_bars, make_problem, relative_error

from vgs_kernels import VGSObjective, fused_linear_vgs_loss

MULTIMODAL = ("student_hidden", "student_weight", "student_bias")  # what a folded call differentiates
FOLDED = {
    "paper": {},
    "gamma=0": {"gamma": 0.0},
    "eta, temperature": {"eta": 0.4, "temperature": 0.8},
    # not foldable: must quietly take the other path and give the same gradients
    "lam": {"lam": 0.5},
    "adaptive": {"schedule": "adaptive"},
    "live prior": {"detach_prior": False},
}


@pytest.mark.parametrize("name", FOLDED)
@pytest.mark.parametrize(
    "extra", [{}, {"student_logit_scale": 0.8, "teacher_logit_scale": 1.2}, {"teacher_softcap": 20.0}]
)
def test_folded_teacher_gives_the_same_gradients(name, extra):
    problem = make_problem(9, 257, bias=True, dtype=torch.float64)
    setting = VGSObjective(**{"lam": 0.0, **FOLDED[name]})
    options = {"objective": setting, "token_weights": weights(problem).double(), **extra}
    options["requires_grad"] = TRAINABLE if name in ("lam", "live prior") else MULTIMODAL
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    folded = evaluate(fused_linear_vgs_loss, problem, return_terms=False, **options)
    assert_gradients_close(folded, exact, rtol=1e-9)


def test_folded_teacher_in_float32(backend):
    problem = make_problem(7, 257, bias=True)
    options = {"objective": VGSObjective(lam=0.0)}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, requires_grad=MULTIMODAL, **options)
    folded = evaluate(
        fused_linear_vgs_loss, problem, requires_grad=MULTIMODAL, return_terms=False, backend=backend, **options
    )
    assert_gradients_close(folded, exact, rtol=float32_bars(problem, exact, vgs_oracle, **options))
    for term in ("standard", "visual", "language", "vds", "gate"):
        assert getattr(folded.output, term) is None, term


def test_folded_loss_is_the_divergence_to_the_composed_target():
    """Its value is (1 + gamma) eta KL(p_I || q~)."""
    problem = make_problem(7, 257, bias=True, dtype=torch.float64)
    gamma, eta = 2.0, 0.4
    folded = fused_linear_vgs_loss(
        *problem.args(), objective=VGSObjective(gamma=gamma, lam=0.0, eta=eta), return_terms=False, **problem.biases()
    )
    kappa = gamma / (1 + gamma)
    target = [
        (1.0, problem.teacher_hidden, problem.teacher_weight, problem.teacher_bias),
        (kappa, problem.student_text_hidden, problem.student_weight, problem.student_bias),
        (-kappa, problem.teacher_text_hidden, problem.teacher_weight, problem.teacher_bias),
    ]
    exact = divergence_oracle(problem.student_hidden, problem.student_weight, target, student_bias=problem.student_bias)
    torch.testing.assert_close(folded.loss, (1 + gamma) * eta * exact.loss, rtol=1e-9, atol=1e-12, check_dtype=False)


def test_folded_teacher_in_bfloat16_is_no_worse_than_bf16_pytorch():
    problem = make_problem(65, 257, dtype=torch.bfloat16)
    options = {"objective": VGSObjective(lam=0.0)}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    eager = evaluate(vgs_oracle, problem, **options)
    folded = evaluate(fused_linear_vgs_loss, problem, return_terms=False, **options)
    names = ("student_hidden", "student_weight")
    for name in names:
        bar = 2 * relative_error(eager.gradients[name], exact.gradients[name])
        assert relative_error(folded.gradients[name], exact.gradients[name]) <= bar, name
