"""The clipped policy gradient of both fused losses against its definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from divergence_checks import TEACHER, TINY, TRAINED, compare, each, on_rows
from divergence_oracle import policy_values
from oracle import head_logits, vgs_oracle
from problems import (
    DEVICE,
    TERMS,
    TRAINABLE,
    Problem,
    assert_gradients_close,
    evaluate,
    float32_bars,
    make_problem,
    relative_error,
    value_floor,
)

from vgs_kernels import PolicyTerm, VGSObjective, fused_linear_divergence, fused_linear_vgs_loss

#: Below, inside and above the clip range, with advantages of either sign and none: each branch of the minimum.
SHIFT = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.05, -0.05, 0.0, 0.3, 2.0], dtype=torch.float64, device=DEVICE)
ADVANTAGES = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -0.5, 1.5, 0.0, -0.3], dtype=torch.float64, device=DEVICE)
WEIGHTS = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.2, 0.1, 0.3, 0.2, 0.05], dtype=torch.float64, device=DEVICE)
KINDS = {
    "reverse": {},
    "jsd": {"divergence": "jsd", "clip": 0.02},
    "sampled": {"divergence": "sampled_reverse_kl"},
    "plausible": {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.01},
    "student top-k": {"divergence": "jsd", "support": "student_top_k", "top_k": 8},
    "T^2": {"divergence": "forward_kl", "temperature": 1.5, "temperature_squared": True, "student_softcap": 15.0},
}


def logps(problem: Problem, *, temperature: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    exact = problem.to(dtype=torch.float64)
    logits = head_logits(
        exact.student_hidden, exact.student_weight, exact.student_bias, softcap=softcap, temperature=temperature
    )
    return logits.log_softmax(-1).gather(1, problem.target_ids[:, None]).squeeze(1)


def likely(problem: Problem) -> Problem:
    """Sampled tokens as a student samples them: the most probable one, and some of the others."""
    logits = problem.student_hidden.double() @ problem.student_weight.double().T
    order = logits.argsort(-1, descending=True)
    places = torch.arange(problem.tokens, device=DEVICE) % 4
    return replace(problem, target_ids=order.gather(1, places[:, None]).squeeze(1))


def policy_of(problem: Problem, *, old: bool = True, transform: dict[str, Any] | None = None, **options) -> PolicyTerm:
    count, dtype = problem.tokens, problem.student_hidden.dtype
    dtype = dtype if dtype == torch.float64 else torch.float32
    old_logps = (logps(problem, **(transform or {})) - SHIFT[:count]).to(dtype) if old else None
    return PolicyTerm(ADVANTAGES[:count].to(dtype), WEIGHTS[:count].to(dtype), old_logps, **options)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("workspace_bytes", [2**30, TINY])
@pytest.mark.parametrize("kind", KINDS)
def test_beside_a_divergence(kind, workspace_bytes, old):
    problem = likely(make_problem(9, 257, bias=True, dtype=torch.float64))
    options = KINDS[kind]
    transform = {"temperature": options.get("temperature", 1.0), "softcap": options.get("student_softcap")}
    policy = policy_of(problem, old=old, transform=transform, epsilon_low=0.2, epsilon_high=0.28)
    compare(problem, TEACHER, workspace_bytes=workspace_bytes, target_ids=problem.target_ids, policy=policy, **options)


@each(["reverse", "jsd", "student top-k"], "jsd")
def test_beside_a_divergence_in_float32(backend, kind):
    problem = likely(make_problem(9 if backend == "torch" else 5, 131, bias=True))
    policy = policy_of(problem)
    compare(problem, TEACHER, backend=backend, target_ids=problem.target_ids, policy=policy, **KINDS[kind])


@each([torch.bfloat16, torch.float16], torch.bfloat16, name="dtype")
def test_beside_a_divergence_in_16_bit(backend, dtype):
    problem = likely(make_problem(5, 131, bias=True, dtype=dtype))
    policy = policy_of(problem)
    compare(problem, TEACHER, backend=backend, target_ids=problem.target_ids, policy=policy, divergence="jsd")


def vgs_with_policy(*args: torch.Tensor, policy: PolicyTerm, **options: Any) -> Any:
    """The oracle of the VGS loss, with the term added to it."""
    output = vgs_oracle(*args, **options)
    logits = head_logits(
        args[0], args[2], options.get("student_bias"), temperature=options["objective"].temperature,
        softcap=options.get("student_softcap"),
    )  # fmt: skip
    values = policy_values(logits.log_softmax(-1).gather(1, options["target_ids"][:, None]).squeeze(1), policy)
    output.loss = output.loss + (policy.weights.to(values) * values).sum()
    output.policy = values.detach()
    return output


OBJECTIVES = {
    "default": VGSObjective(lam=0.5, eta=0.4),
    "live prior": VGSObjective(lam=0.5, eta=0.4, detach_prior=False),
    "adaptive": VGSObjective(lam=0.5, eta=0.4, schedule="adaptive", temperature=1.3),
}


def compare_vgs(problem: Problem, policy: PolicyTerm, *, backend: str, workspace_bytes: int, **options: Any) -> None:
    options |= {"policy": policy, "target_ids": problem.target_ids}
    kernel = {"backend": backend, "workspace_bytes": workspace_bytes}
    double = problem.student_hidden.dtype == torch.float64
    exact = evaluate(vgs_with_policy, problem, dtype=torch.float64, **options)
    ours = evaluate(fused_linear_vgs_loss, problem, **options, **kernel)
    rtol, floor = (1e-9, 1e-11) if double else (1e-5, 4 * value_floor(problem))
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=rtol, atol=4 * floor)
    for name in (*TERMS, "policy"):
        value = getattr(ours.output, name)
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), getattr(exact.output, name), rtol=rtol, atol=floor, msg=name)
    assert_gradients_close(
        ours, exact, rtol=rtol if double else float32_bars(problem, exact, vgs_with_policy, **options)
    )


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("workspace_bytes", [2**30, 2**13])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_beside_the_vgs_loss(name, workspace_bytes, old):
    objective = OBJECTIVES[name]
    problem = likely(make_problem(9, 257, bias=True, dtype=torch.float64))
    policy = policy_of(problem, old=old, transform={"temperature": objective.temperature, "softcap": 15.0})
    options = {"objective": objective, "student_softcap": 15.0, "backend": "torch"}
    compare_vgs(problem, policy, workspace_bytes=workspace_bytes, **options)


@pytest.mark.parametrize("backend", ["loops", "triton"], indirect=True)
def test_beside_the_vgs_loss_in_float32(backend):
    problem = likely(make_problem(4, 131, bias=True))
    options = {"objective": OBJECTIVES["live prior"], "backend": backend, "workspace_bytes": TINY}
    compare_vgs(problem, policy_of(problem, transform={"softcap": 15.0}), student_softcap=15.0, **options)


def test_beside_gated_tokens_that_are_compacted(backend):
    """With a threshold known beforehand, the language term of the gated tokens comes from the same tile."""
    problem = likely(make_problem(6, 131, dtype=torch.float64 if backend == "torch" else torch.float32))
    options = {"objective": OBJECTIVES["default"], "vds_threshold": 0.1, "backend": backend}
    compare_vgs(problem, policy_of(problem), workspace_bytes=2**30, **options)


def test_beside_the_folded_vgs_loss():
    """``return_terms=False`` folds the teacher's rows; the term is in the loss all the same."""
    problem = likely(make_problem(9, 131, bias=True, dtype=torch.float64))
    options = {"objective": VGSObjective(lam=0.0, eta=0.4), "target_ids": problem.target_ids}
    run = {"requires_grad": TRAINED, **options}
    policy = policy_of(problem)
    folded, without = (
        evaluate(fused_linear_vgs_loss, problem, return_terms=False, **run, **extra)
        for extra in ({"policy": policy}, {})
    )
    whole, plain = (evaluate(fused_linear_vgs_loss, problem, **run, **extra) for extra in ({"policy": policy}, {}))
    torch.testing.assert_close(folded.loss - without.loss, whole.loss - plain.loss)
    for name in TRAINED:
        theirs = whole.gradients[name] - plain.gradients[name]
        assert relative_error(folded.gradients[name] - without.gradients[name], theirs) < 1e-8, name


@each(["divergence", "vgs"], "divergence", name="loss")
def test_zero_token_weights_leave_the_pure_policy_gradient(backend, loss):
    """Neither the token weights nor eta touch it."""
    problem = likely(make_problem(9 if backend == "torch" else 5, 131, bias=True, dtype=torch.float32))
    policy = policy_of(problem)
    options = {
        "token_weights": torch.zeros(problem.tokens, device=DEVICE), "policy": policy,
        "target_ids": problem.target_ids, "backend": backend, "requires_grad": TRAINED,
    }  # fmt: skip
    if loss == "vgs":
        ours = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(eta=0.3, lam=0.0), **options)
    else:
        ours = evaluate(on_rows(fused_linear_divergence, TEACHER), problem, divergence="jsd", **options)
    exact = problem.to(dtype=torch.float64).leaves(TRAINED)
    logits = head_logits(exact.student_hidden, exact.student_weight, exact.student_bias)
    values = policy_values(logits.log_softmax(-1).gather(1, exact.target_ids[:, None]).squeeze(1), policy)
    expected = (policy.weights.double() * values).sum()
    expected.backward()
    torch.testing.assert_close(ours.loss.double(), expected.detach(), rtol=1e-5, atol=2e-5)
    for name in TRAINED:
        assert relative_error(ours.gradients[name], getattr(exact, name).grad) < 2e-5, name


def test_clipped_tokens_have_no_gradient(backend):
    """A ratio beyond its bound on the side of the advantage; the other side keeps its gradient."""
    problem = likely(make_problem(4, 131))
    shift = torch.tensor([0.5, 0.5, -0.5, -0.5], device=DEVICE)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0], device=DEVICE)
    policy = PolicyTerm(advantages, torch.ones(4, device=DEVICE), (logps(problem) - shift.double()).float())
    out = evaluate(
        on_rows(fused_linear_divergence, TEACHER), problem, requires_grad=TRAINED[:1], backend=backend,
        policy=policy, token_weights=torch.zeros(4, device=DEVICE), target_ids=problem.target_ids,
    )  # fmt: skip
    moved = out.gradients["student_hidden"].norm(dim=1) > 1e-4
    assert moved.tolist() == [False, True, True, False]
    torch.testing.assert_close(
        out.output.policy, torch.tensor([-1.2, math.exp(0.5), -math.exp(-0.5), 0.8], device=DEVICE), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("loss", ["divergence", "vgs"])
def test_probability_near_one_in_bfloat16(backend, loss):
    """Of p(y) = 1 - 1e-4 the gradient is a small difference: 16-bit logits lose it, float32 ones keep it."""
    problem = make_problem(5, 131, dtype=torch.bfloat16)
    hidden = problem.student_hidden.double() * 2.5
    problem = replace(problem, student_hidden=hidden.bfloat16())
    logits = problem.student_hidden.double() @ problem.student_weight.double().T
    problem = replace(problem, target_ids=logits.argmax(-1))
    assert logps(problem).exp().max() > 0.999
    ones = torch.ones(5, device=DEVICE)
    policy = PolicyTerm(ones, ones)
    options = {
        "token_weights": 0 * ones, "policy": policy, "target_ids": problem.target_ids, "backend": backend,
        "requires_grad": TRAINED[:1],
    }  # fmt: skip
    if loss == "vgs":
        ours = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(lam=0.0), **options)
    else:
        ours = evaluate(on_rows(fused_linear_divergence, TEACHER), problem, **options)
    exact = problem.to(dtype=torch.float64).leaves(TRAINED[:1])
    (-(exact.student_hidden @ exact.student_weight.T).log_softmax(-1)).gather(
        1, exact.target_ids[:, None]
    ).sum().backward()
    gradient = exact.student_hidden.grad
    for row, reference in zip(ours.gradients["student_hidden"], gradient, strict=True):
        assert relative_error(row, reference) < 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(ours.output.policy, -ones, rtol=1e-6, atol=0)


def test_masked_columns(backend):
    """Columns that nobody can sample change nothing, and a sampled one has ratio 0."""
    dtype = torch.float64 if backend == "torch" else torch.float32
    problem = likely(make_problem(5, 131, bias=True, dtype=dtype))
    columns = torch.tensor([i for i in range(0, 131, 9) if i not in problem.target_ids.tolist()], device=DEVICE)
    problem.student_bias[columns] = problem.teacher_bias[columns] = -torch.inf
    policy = policy_of(problem)
    options = {"backend": backend, "policy": policy, "workspace_bytes": 2**11}
    compare(problem, TEACHER, target_ids=problem.target_ids, divergence="jsd", **options)
    excluded = torch.cat([columns[:1], problem.target_ids[1:]])
    run = on_rows(fused_linear_divergence, TEACHER)
    policy = policy._replace(old_logps=policy.old_logps.clamp_min(-20.0))
    ours = evaluate(run, problem, requires_grad=TRAINED, target_ids=excluded, **{**options, "policy": policy})
    assert ours.output.policy[0] == 0 and ours.output.target_logps[0] == -torch.inf
    assert ours.loss.isfinite() and all(gradient.isfinite().all() for gradient in ours.gradients.values())


def test_frozen_student_head():
    problem = likely(make_problem(5, 131, bias=True))
    options = {"policy": policy_of(problem), "target_ids": problem.target_ids}
    compare(problem, TEACHER, requires_grad=TRAINED[:1], **options)
    compare(problem, TEACHER, requires_grad=TRAINED[1:], **options)


def test_no_tokens(backend):
    problem = make_problem(0, 57, bias=True)
    nothing = torch.zeros(0, device=DEVICE)
    options = {"policy": PolicyTerm(nothing, nothing, nothing), "target_ids": problem.target_ids, "backend": backend}
    for function, required in (
        (on_rows(fused_linear_divergence, TEACHER), TRAINED),
        (fused_linear_vgs_loss, TRAINABLE),
    ):
        out = evaluate(function, problem, requires_grad=required, **options)
        assert out.loss == 0 and out.output.policy.shape == (0,)
        assert all(gradient is not None and not gradient.any() for gradient in out.gradients.values())


def test_advantages_and_weights_get_no_gradient():
    problem = likely(make_problem(5, 57))
    ones = torch.ones(5, device=DEVICE)
    leaves = [ones.clone().requires_grad_() for _ in range(3)]
    hidden = problem.student_hidden.clone().requires_grad_()
    rows = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
    policy = PolicyTerm(leaves[0], leaves[1], -leaves[2])
    options = {"target_ids": problem.target_ids, "policy": policy}
    fused_linear_divergence(hidden, problem.student_weight, rows, **options).loss.backward()
    assert hidden.grad is not None and all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("target_ids", {"target_ids": None}),
        (r"policy\.advantages", {"policy": PolicyTerm(torch.ones(4), torch.ones(5))}),
        (r"policy\.weights", {"policy": PolicyTerm(torch.ones(5), [1.0] * 5)}),
        (r"policy\.old_logps", {"policy": PolicyTerm(torch.ones(5), torch.ones(5), torch.ones(5, 1))}),
        (r"policy\.epsilon_low", {"policy": PolicyTerm(torch.ones(5), torch.ones(5), None, -1.0)}),
        ("policy", {"policy": (torch.ones(5), torch.ones(5))}),
    ],
)
def test_errors_of_the_vgs_loss(name, changes):
    problem = make_problem(5, 57, device="cpu")
    options = {"policy": PolicyTerm(torch.ones(5), torch.ones(5)), "target_ids": problem.target_ids, **changes}
    with pytest.raises((ValueError, TypeError), match=name):
        fused_linear_vgs_loss(*problem.args(), **options)
