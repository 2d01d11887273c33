"""Properties that hold for every input: chunking, order of rows and of the vocabulary, linearity, folding."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import vgs_oracle
from problems import DEVICE, TERMS, TRAINABLE, Problem, evaluate, make_problem

from vgs_kernels import VGSObjective, fused_linear_vgs_loss

CLOSE = {"rtol": 1e-8, "atol": 1e-11}

objectives = st.builds(
    VGSObjective,
    gamma=st.sampled_from([0.0, 0.5, 2.0, 4.0]),
    lam=st.sampled_from([0.0, 0.01, 1.0]),
    eta=st.sampled_from([0.36, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 1.5]),
    detach_prior=st.booleans(),
    schedule=st.sampled_from(["constant", "adaptive"]),
)


@st.composite
def problems(draw: st.DrawFn, min_tokens: int = 0) -> Problem:
    return make_problem(
        draw(st.integers(min_tokens, 13)),
        draw(st.integers(2, 97)),
        draw(st.integers(2, 5)),
        draw(st.integers(5, 9)),
        gap=draw(st.sampled_from([1.0, 0.3, 1e-2, 1e-3])),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
        dtype=torch.float64,
    )


def run(problem: Problem, objective: VGSObjective, **options):
    return evaluate(
        fused_linear_vgs_loss, problem, objective=objective, **{"target_ids": problem.target_ids, **options}
    )


def assert_same(ours, expected, *, terms=TERMS) -> None:
    torch.testing.assert_close(ours.loss, expected.loss, **CLOSE)
    for name in terms:
        torch.testing.assert_close(getattr(ours.output, name), getattr(expected.output, name), **CLOSE, msg=name)
    for name, gradient in ours.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name], **CLOSE, msg=name)


@given(problems(), objectives)
def test_equals_the_oracle(problem, objective):
    exact = evaluate(vgs_oracle, problem, objective=objective, target_ids=problem.target_ids)
    zeros = {n: torch.zeros_like(getattr(problem, n)) for n, g in exact.gradients.items() if g is None}
    exact.gradients.update(zeros)
    ours = run(problem, objective)
    assert_same(ours, exact)
    assert torch.equal(ours.output.gate, exact.output.gate)


@given(problems(), objectives, st.integers(1, 2**16))
def test_workspace_does_not_matter(problem, objective, workspace_bytes):
    assert_same(run(problem, objective, workspace_bytes=workspace_bytes), run(problem, objective))


@given(problems(min_tokens=1), objectives, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(problem, objective, random):
    order = list(range(problem.tokens))
    random.shuffle(order)
    index = torch.tensor(order, device=DEVICE)
    base, permuted = run(problem, objective), run(problem.rows(index), objective)
    torch.testing.assert_close(permuted.loss, base.loss, **CLOSE)
    for name in TERMS:
        torch.testing.assert_close(getattr(permuted.output, name), getattr(base.output, name)[index], **CLOSE, msg=name)
    for name, gradient in base.gradients.items():
        expected = gradient[index] if "hidden" in name else gradient
        torch.testing.assert_close(permuted.gradients[name], expected, **CLOSE, msg=name)


@given(problems(), objectives, st.randoms(use_true_random=False))
def test_order_of_the_vocabulary_does_not_matter(problem, objective, random):
    order = list(range(problem.student_weight.shape[0]))
    random.shuffle(order)
    index = torch.tensor(order, device=DEVICE)
    heads = ["student_weight", "teacher_weight", *problem.biases()]
    permuted = replace(problem, **{name: getattr(problem, name)[index] for name in heads})
    base = run(problem, objective)
    moved = run(permuted, objective, target_ids=torch.argsort(index)[problem.target_ids])
    base.gradients.update({n: g[index] for n, g in base.gradients.items() if n in heads})
    assert_same(moved, base)


@given(problems(min_tokens=1), objectives, st.floats(-3, 3), st.integers(0, 1000))
def test_linear_in_the_token_weights(problem, objective, factor, seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.rand(problem.tokens, generator=generator, dtype=torch.float64).to(DEVICE) for _ in range(2))
    runs = [run(problem, objective, token_weights=w) for w in (first, second, first + factor * second)]
    torch.testing.assert_close(runs[2].loss, runs[0].loss + factor * runs[1].loss, rtol=1e-6, atol=1e-6)
    for name in runs[0].gradients:
        expected = runs[0].gradients[name] + factor * runs[1].gradients[name]
        torch.testing.assert_close(runs[2].gradients[name], expected, rtol=1e-5, atol=1e-6, msg=name)


@given(problems(), objectives)
def test_folded_equals_unfolded(problem, objective):
    folded, full = run(problem, objective, return_terms=False), run(problem, objective)
    for name, gradient in full.gradients.items():
        if folded.gradients[name] is None:  # a folded call does not differentiate the text-only rows
            assert name == "student_text_hidden"
            assert not gradient.any()
        else:
            torch.testing.assert_close(folded.gradients[name], gradient, **CLOSE, msg=name)


@given(problems(min_tokens=1), objectives, st.integers(0, 12))
def test_a_split_call_adds_up(problem, objective, at):
    """Two calls over parts of the tokens with the shared threshold sum to one call over all of them."""
    whole = run(problem, objective)
    limits = tuple(
        torch.quantile(whole.output.vds.double(), q) for q in (objective.adaptive_quantile, objective.vds_quantile)
    )
    options = {"vds_threshold": limits if objective.schedule == "adaptive" else limits[1]}
    parts = [problem.rows(slice(None, at)), problem.rows(slice(at, None))]
    runs = [
        run(part, objective, token_weights=torch.full((part.tokens,), 1 / problem.tokens, device=DEVICE), **options)
        for part in parts
    ]
    torch.testing.assert_close(runs[0].loss + runs[1].loss, whole.loss, rtol=1e-5, atol=1e-7)
    for name in TRAINABLE[2:]:
        if name in whole.gradients:
            total = runs[0].gradients[name] + runs[1].gradients[name]
            torch.testing.assert_close(total, whole.gradients[name], rtol=1e-5, atol=1e-7, msg=name)


@given(problems(min_tokens=1), objectives)
def test_terms_are_divergences(problem, objective):
    """Never negative beyond rounding; entropy within [0, log V]; log-probabilities not above 0."""
    out = run(problem, objective).output
    for name in ("standard", "visual", "language", "vds", "student_vds", "entropy"):
        assert (getattr(out, name) > -1e-5).all(), name
    vocab = problem.student_weight.shape[0]
    assert (out.entropy <= torch.tensor(float(vocab)).log() + 1e-5).all()
    assert (out.target_logps <= 1e-5).all()


@given(problems(min_tokens=1), st.booleans())
def test_student_equal_to_teacher_is_a_fixed_point(problem, detach_prior):
    """Then q* = p_I: every term but vds vanishes, and so does every gradient."""
    twin = replace(
        problem,
        teacher_hidden=problem.student_hidden,
        teacher_text_hidden=problem.student_text_hidden,
        teacher_weight=problem.student_weight,
        teacher_bias=problem.student_bias,
    )
    ours = run(twin, VGSObjective(lam=1.0, detach_prior=detach_prior))
    for name in ("standard", "visual", "language"):
        torch.testing.assert_close(getattr(ours.output, name), torch.zeros_like(ours.output.vds), rtol=0, atol=1e-9)
    for name, gradient in ours.gradients.items():
        assert gradient.abs().max() < 1e-9, name
    torch.testing.assert_close(ours.output.vds, ours.output.student_vds, **CLOSE)


@given(problems(min_tokens=1), st.floats(-20, 20), st.floats(-20, 20))
def test_logits_shifted_by_a_constant(problem, student_shift, teacher_shift):
    """A bias that is the same for every token of the vocabulary changes nothing."""
    vocab = problem.student_weight.shape[0]
    blank = torch.zeros(vocab, dtype=torch.float64, device=DEVICE)
    base = replace(problem, student_bias=blank, teacher_bias=blank)
    moved = replace(problem, student_bias=blank + student_shift, teacher_bias=blank + teacher_shift)
    assert_same(run(moved, VGSObjective(lam=0.5)), run(base, VGSObjective(lam=0.5)))
