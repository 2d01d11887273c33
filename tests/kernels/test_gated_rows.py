"""The language term of tokens that are likely to pass the gate, formed beside a GPU's gradient blocks, in Triton."""

from dataclasses import replace

import pytest
import torch
from oracle import vgs_oracle
from problems import DEVICE, TRAINABLE, assert_gradients_close, evaluate, make_problem

from vgs_kernels import VGSObjective, arguments, fused_linear_vgs_loss, gated_rows, gradients, steering

STRONG = {"lam": 0.5, "gamma": 0.7}
TOKENS, VOCAB = 120, 211
#: For each column of the slabs, 64 tokens of four float32 rows, and of a 16-bit one with what is beside it: tiles and
#: blocks of 64 tokens and 56.
SPACE = 256 * (64 * 16 + 64 * 4)
TRAINED = {"all": TRAINABLE, "frozen head": TRAINABLE[:2], "text alone": TRAINABLE[1:2], "head alone": TRAINABLE[2:3]}


@pytest.fixture(autouse=True)
def blocks_of_16_bits(monkeypatch):
    """As on devices whose products take 16-bit gradients of logits, and as if the tokens were many."""
    monkeypatch.setattr(
        arguments, "gradient_dtype", lambda x, head, dtype: x.dtype if x.dtype == head.dtype != dtype else dtype
    )
    monkeypatch.setattr(steering, "_FEW_TOKENS", 0)


class Corrected:
    """Tokens whose term was formed in slots, and those that were put right afterwards."""

    def __init__(self, monkeypatch) -> None:
        self.formed = self.added = self.taken_back = 0
        unformed = steering.VGSLoss.unformed

        def counted(loss):
            tokens, weights = unformed(loss)
            self.formed = sum(int(x.sum()) for x in loss._formed)
            self.added, self.taken_back = (int((sign * weights > 0).sum()) for sign in (1, -1))
            return tokens, weights

        monkeypatch.setattr(steering.VGSLoss, "unformed", counted)


def run(problem, workspace_bytes=SPACE, **options):
    return evaluate(fused_linear_vgs_loss, problem, **options, backend="triton", workspace_bytes=workspace_bytes)


def assert_exact(monkeypatch, problem, exact=None, workspace_bytes=SPACE, **options):
    counts = Corrected(monkeypatch)
    exact = exact or evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    ours = run(problem, workspace_bytes, **options)
    assert_gradients_close(ours, exact, rtol=7e-3)  # stored twice in bf16: 2^-9 each
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
    if "student_text_hidden" in ours.gradients:
        assert (ours.gradients["student_text_hidden"][~ours.output.gate] == 0).all()
    return ours, counts


def bfloat16_problem(**options):
    return make_problem(TOKENS, VOCAB, **options).to(dtype=torch.bfloat16)


SLOW = pytest.mark.slow


def some(fast, *slow):
    return [*fast, *(pytest.param(name, marks=SLOW) for name in slow)]


@pytest.mark.parametrize("trained", some(["all", "text alone"], "frozen head", "head alone"))
def test_most_gated_tokens_are_formed_in_slots(monkeypatch, trained):
    problem = bfloat16_problem(bias=trained == "all")
    options = {"objective": VGSObjective(**STRONG), "requires_grad": TRAINED[trained]}
    ours, counts = assert_exact(monkeypatch, problem, **options)
    gated = int(ours.output.gate.sum())
    if trained == "text alone":  # there is no block that they could be beside
        assert (counts.formed, counts.added) == (0, gated)
    else:
        assert counts.formed - counts.taken_back + counts.added == gated and counts.formed > 0.8 * gated


GATES = {
    "threshold": {"vds_threshold": 0.05},
    "threshold, none above": {"vds_threshold": 1e9},
    "threshold, all above": {"vds_threshold": -1.0},
    "scores": {"vds": torch.linspace(0, 1, TOKENS, device=DEVICE).roll(70)},
    "scores and threshold": {"vds": torch.linspace(0, 1, TOKENS, device=DEVICE).roll(70), "vds_threshold": 0.41},
    "adaptive": {"objective": VGSObjective(**STRONG, schedule="adaptive")},
}


@pytest.mark.parametrize("gate", some(["threshold", "scores"], *list(GATES)[1:3], *list(GATES)[4:]))
def test_a_gate_that_is_known_before(monkeypatch, gate):
    options = {"objective": VGSObjective(**STRONG), **GATES[gate]}
    ours, counts = assert_exact(monkeypatch, bfloat16_problem(), **options)
    gated = int(ours.output.gate.sum())
    assert counts.formed + counts.added == gated and counts.taken_back == 0
    assert counts.formed >= min(gated, 40) * 0.9  # of all tokens there are slots for a third


@pytest.mark.parametrize("order", some(["descending"], "ascending"))
def test_guesses_that_are_wrong_are_put_right(monkeypatch, order):
    """Of tokens in a bad order nearly all are taken back, or find no slot and are added."""
    problem, options = bfloat16_problem(), {"objective": VGSObjective(**STRONG)}
    scores = evaluate(vgs_oracle, problem, requires_grad=(), dtype=torch.float64, **options).output.vds
    _, counts = assert_exact(monkeypatch, problem.rows(scores.argsort(descending=order == "descending")), **options)
    assert counts.taken_back > 15 if order == "ascending" else counts.added > 10


@pytest.mark.parametrize("n", [104, TOKENS])
@pytest.mark.parametrize("tolerance", some([0.0], 1e-3))
def test_wrong_guesses_share_the_last_block_if_it_has_room(monkeypatch, n, tolerance):
    """A block has 64 tokens and 32 slots; the last one of 104 tokens has 40 and 16, of 120 tokens 56 and 32."""
    asked, append = [], gradients.LinearSink.append

    def observed(sink, tokens):
        place = append(sink, tokens)
        asked.append((len(tokens), place is not None))
        return place

    monkeypatch.setattr(gradients.LinearSink, "append", observed)
    problem, options = bfloat16_problem().rows(slice(0, n)), {"objective": VGSObjective(**STRONG)}
    scores = evaluate(vgs_oracle, problem, requires_grad=(), dtype=torch.float64, **options).output.vds
    problem = problem.rows(scores.argsort(descending=True))
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    assert_exact(monkeypatch, problem, exact, **options, gradient_tolerance=tolerance)
    ((wrong, fit),) = asked
    assert wrong > 8 and fit == (n == 104)


@pytest.mark.parametrize("softcap", some([5.0], None))
def test_ignored_tokens_masked_columns_and_soft_caps(monkeypatch, softcap):
    problem = bfloat16_problem(bias=True)
    for bias in problem.biases().values():
        bias[VOCAB // 2 :][:3] = -torch.inf
    ids = problem.target_ids.index_fill(0, torch.arange(0, TOKENS, 3, device=DEVICE), -100)
    options = {"objective": VGSObjective(**STRONG, temperature=0.8), "target_ids": ids}
    options |= {"student_softcap": softcap, "teacher_softcap": softcap}
    exact = evaluate(fused_linear_vgs_loss, problem, dtype=torch.float64, **options, backend="torch")
    ours, counts = assert_exact(monkeypatch, problem, exact, **options)
    assert not ours.output.gate[::3].any() and counts.formed > 20


@SLOW
def test_what_is_not_finite_gets_no_slot():
    """A term of NaN that was added could not be taken back: it waits until the gate is known, and is not gated."""
    options = {"objective": VGSObjective(lam=0.4, gamma=0.0)}
    problem = bfloat16_problem(bias=True)
    problem = problem.rows(evaluate(vgs_oracle, problem, requires_grad=(), **options).output.vds.argsort())
    problem.student_text_hidden[60] = torch.nan  # among the highest of the first tile, and the lowest of all
    ours = run(problem, **options)
    known = run(problem, **options, vds=ours.output.vds)
    assert ours.output.language[60].isnan() and not ours.output.gate[60]
    assert all(gradient.isfinite().all() for gradient in ours.gradients.values())
    assert_gradients_close(ours, known, rtol=1e-2)


def test_an_empty_slot_holds_nothing():
    """Whatever the first token's states are: its rows of zeros are multiplied with them."""
    problem, options = (
        bfloat16_problem(bias=True),
        {"objective": VGSObjective(lam=0.4, gamma=0.0), "vds_threshold": 1e9},
    )
    problem.student_text_hidden[0] = torch.nan
    assert all(gradient.isfinite().all() for gradient in run(problem, **options).gradients.values())


@pytest.mark.parametrize("few", [0, 256])
def test_a_gated_token_that_is_not_finite_shows(monkeypatch, few):
    """Its loss is NaN, and so are its gradients, however many tokens there are."""
    monkeypatch.setattr(steering, "_FEW_TOKENS", few)
    problem, options = bfloat16_problem(bias=True).rows(slice(0, 130)), {"objective": VGSObjective(lam=0.4, gamma=0.0)}
    scores = evaluate(vgs_oracle, problem, requires_grad=(), **options).output.vds
    problem.student_text_hidden[scores.argmax()] = torch.nan
    ours = run(problem, 2**28, **options)
    assert ours.loss.isnan() and ours.gradients["student_weight"].isnan().any()


def test_without_tokens_there_is_no_block():
    ours = run(bfloat16_problem().rows(slice(0, 0)), objective=VGSObjective(**STRONG))
    assert ours.loss == 0 and all((gradient == 0).all() for gradient in ours.gradients.values())


def test_views_of_two_dtypes_have_no_block_in_common():
    problem, options = bfloat16_problem(), {"objective": VGSObjective(**STRONG)}
    problem = replace(problem, student_hidden=problem.student_hidden.float())
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    assert_gradients_close(run(problem, **options), exact, rtol=7e-3)


def test_certain_text_only_rows_are_as_exact_as_others(monkeypatch):
    """Where an entry has all but a millionth of the mass, its gradient is the sum of the others'."""
    problem = make_problem(TOKENS, VOCAB).to(dtype=torch.bfloat16)
    problem.student_text_hidden.mul_(6)
    assert_exact(monkeypatch, problem, objective=VGSObjective(**STRONG))


def test_with_a_tolerance_both_views_are_counted(monkeypatch):
    """What a token loses is of its two rows; a token without a slot has one."""
    options = {"objective": VGSObjective(**STRONG)}
    ours = run(bfloat16_problem(), **options, gradient_tolerance=1e-3)
    exact = run(bfloat16_problem(), **options)
    assert (ours.output.gradient_lost <= 1e-3).all() and (ours.output.gradient_kept > 0).all()
    assert_gradients_close(ours, exact, rtol=3e-3)


@pytest.mark.parametrize("quantile", some([0.7], 0.0, 0.99))
def test_few_tokens_know_their_gate(monkeypatch, quantile):
    """All are in one tile: there is a slot for each that passes, nothing is guessed, and nobody counts."""
    monkeypatch.setattr(steering, "_FEW_TOKENS", 256)
    objective = VGSObjective(**STRONG, vds_quantile=quantile)
    ours, counts = assert_exact(monkeypatch, bfloat16_problem(), workspace_bytes=2**30, objective=objective)
    assert counts.formed == counts.added == 0 and int(ours.output.gate.sum()) == {0.0: 119, 0.7: 36, 0.99: 2}[quantile]


def test_a_captured_call_does_not_guess(monkeypatch):
    """The host cannot count what was wrong: all gated tokens are projected again."""
    monkeypatch.setattr(steering, "_captures", lambda like: True)
    ours, counts = assert_exact(monkeypatch, bfloat16_problem(), objective=VGSObjective(**STRONG))
    assert counts.formed == 0 and counts.added == int(ours.output.gate.sum())


def test_float16_keeps_a_phase_of_its_own(monkeypatch):
    """lam is no part of its logit gradients, for they would be too small."""
    counts = Corrected(monkeypatch)
    ours = run(make_problem(TOKENS, VOCAB).to(dtype=torch.float16), objective=VGSObjective(lam=0.4))
    assert counts.formed == 0 and counts.added == int(ours.output.gate.sum())


def test_slots_follow_the_quantile():
    assert gated_rows.slot_share(0.0) == 1.0 and gated_rows.slot_share(1.0) == 0.0
    assert gated_rows.slot_share(0.7) == pytest.approx(0.33)
