"""The language term is a phase of its own, however the gate is known, in place or in gradient blocks."""

from itertools import product

import pytest
import torch
from oracle import vgs_oracle
from problems import DEVICE, TRAINABLE, assert_gradients_close, evaluate, float32_bars, make_problem

from vgs_kernels import VGSObjective, arguments, fused_linear_vgs_loss, steering
from vgs_kernels.plan import Plan

STRONG = {"lam": 0.4, "gamma": 0.7}
VOCAB = 211
#: The interpreter of the Triton kernels is slow; blocks need more tokens, so that several tiles fill one.
TOKENS = {"torch": 600, "triton": 41}
BLOCK_TOKENS = {"torch": 600, "triton": 130}


def gates(tokens: int) -> dict[str, dict]:
    scores = torch.linspace(0, 1, tokens).roll(tokens // 3)
    return {
        "exact quantile": {},
        "threshold": {"vds_threshold": 0.05},
        "threshold, none above": {"vds_threshold": 1e9},
        "threshold, all above": {"vds_threshold": -1.0},
        "scores": {"vds": scores},
        "scores and threshold": {"vds": scores, "vds_threshold": 0.41},
    }


GATES = list(gates(1))
#: Large tiles; tiles of 64 tokens, several of which fill a gradient block of 16 bits; cut columns.
WORKSPACES = {"large": 2**30, "small": 2**19, "cut": 2**11}
TRAINED = {"all": TRAINABLE, "frozen head": TRAINABLE[:2], "text alone": TRAINABLE[1:2], "head alone": TRAINABLE[2:3]}
TRAINED["hidden states alone"] = TRAINABLE[:1]


@pytest.mark.parametrize("prior", ["detached", "live"])
@pytest.mark.parametrize(("gate", "trained"), product(GATES, TRAINED))
def test_gradients_however_the_gate_is_known(gate, prior, trained):
    assert_exact_gradients("torch", gate, prior, trained)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("gate", "prior", "trained"),
    [
        ("threshold", "live", "all"),
        ("scores", "detached", "all"),
        ("exact quantile", "live", "frozen head"),
        pytest.param("threshold", "detached", "all", marks=SLOW),
        pytest.param("scores", "live", "all", marks=SLOW),
        pytest.param("exact quantile", "detached", "frozen head", marks=SLOW),
    ],
)
def test_gradients_however_the_gate_is_known_in_triton(gate, prior, trained):
    assert_exact_gradients("triton", gate, prior, trained)


def assert_exact_gradients(backend, gate, prior, trained):
    problem = make_problem(TOKENS[backend], VOCAB, bias=trained == "all")
    objective = VGSObjective(**STRONG, detach_prior=prior == "detached")
    options = {"objective": objective, **gates(problem.tokens)[gate]}
    required = {"requires_grad": TRAINED[trained]}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **required, **options)
    bars = float32_bars(problem, exact, vgs_oracle, **options)
    runs = [(backend, "small")]
    if backend == "torch":
        runs = [*product([backend], WORKSPACES), *(product(["loops"], ["small", "cut"]) if DEVICE == "cpu" else ())]
    for rows, name in runs:
        space = WORKSPACES[name]
        ours = evaluate(fused_linear_vgs_loss, problem, **required, **options, backend=rows, workspace_bytes=space)
        assert_gradients_close(ours, exact, rtol=bars)
        torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient_bytes", [2, 4])
def test_small_tiles_fill_several_gradient_blocks(gradient_bytes):
    plan = Plan.fit(BLOCK_TOKENS["torch"], VOCAB, 16, gradient_bytes, WORKSPACES["small"], max_rows=256)
    assert BLOCK_TOKENS["torch"] > plan.gradient_rows > plan.rows and plan.columns == VOCAB
    plan = Plan.fit(BLOCK_TOKENS["triton"], VOCAB, 16, gradient_bytes, WORKSPACES["small"], max_rows=256)
    assert plan.gradient_rows > plan.rows


@pytest.fixture
def blocks_of_16_bits(monkeypatch):
    """Blocks that hold several tiles, as on devices whose products take 16-bit gradients of logits."""
    monkeypatch.setattr(arguments, "gradient_dtype", lambda hidden, *_: hidden.dtype)


@pytest.mark.parametrize("prior", ["detached", "live"])
@pytest.mark.parametrize(("gate", "workspace"), product(GATES, WORKSPACES))
def test_gradient_blocks_of_16_bits(blocks_of_16_bits, gate, prior, workspace):
    assert_gradients_of_16_bits("torch", gate, prior, workspace)


@pytest.mark.parametrize(
    ("gate", "prior"),
    [
        ("exact quantile", "live"),
        ("threshold", "detached"),
        pytest.param("exact quantile", "detached", marks=SLOW),
        pytest.param("threshold", "live", marks=SLOW),
    ],
)
def test_gradient_blocks_of_16_bits_in_triton(blocks_of_16_bits, gate, prior):
    assert_gradients_of_16_bits("triton", gate, prior, "small")


def assert_gradients_of_16_bits(backend, gate, prior, workspace):
    problem = make_problem(BLOCK_TOKENS[backend], VOCAB).to(dtype=torch.bfloat16)
    objective = VGSObjective(**STRONG, detach_prior=prior == "detached")
    options = {"objective": objective, **gates(problem.tokens)[gate]}
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    ours = evaluate(fused_linear_vgs_loss, problem, **options, backend=backend, workspace_bytes=WORKSPACES[workspace])
    assert_gradients_close(ours, exact, rtol=7e-3)  # stored twice in bf16: 2^-9 each


@pytest.mark.parametrize(
    ("gate", "prior", "trained", "sweeps"),
    [
        ("exact quantile", "detached", "all", 2),
        ("exact quantile", "live", "frozen head", 2),
        ("threshold", "detached", "all", 2),
        ("threshold", "detached", "hidden states alone", 1),  # the language term has no gradient to them
    ],
)
def test_a_sweep_for_each_phase(monkeypatch, gate, prior, trained, sweeps):
    calls = []
    sweep = steering.sweep
    monkeypatch.setattr(steering, "sweep", lambda *args, **options: calls.append(1) or sweep(*args, **options))
    objective = VGSObjective(**STRONG, detach_prior=prior == "detached")
    problem = make_problem(41, VOCAB)
    options = {"requires_grad": TRAINED[trained], "objective": objective, **gates(41)[gate]}
    evaluate(fused_linear_vgs_loss, problem, **options)
    assert len(calls) == sweeps


class Guessed:
    """Counts the tokens whose language term is formed or taken back after the sweep."""

    def __init__(self, monkeypatch) -> None:
        self.counts, unformed = [], steering.VGSLoss.unformed

        def counted(loss):
            tokens, weights = unformed(loss)
            self.counts.append((len(tokens), int((weights < 0).sum())))
            return tokens, weights

        monkeypatch.setattr(steering.VGSLoss, "unformed", counted)


@pytest.mark.parametrize("order", ["shuffled", "ascending", "descending"])
@pytest.mark.parametrize("ignored", [False, True])
def test_the_gate_is_guessed_from_the_tokens_so_far(monkeypatch, order, ignored):
    """Exact, however wrong the guesses: of tokens in a bad order nearly all are added, or taken back, at the end."""
    problem = make_problem(600, VOCAB, bias=True)
    options = {"objective": VGSObjective(**STRONG)}
    vds = evaluate(vgs_oracle, problem, requires_grad=(), dtype=torch.float64, **options).output.vds
    if order != "shuffled":
        problem = problem.rows(vds.argsort(descending=order == "descending"))
    if ignored:
        options["token_weights"] = torch.full((600,), 1 / 600).index_fill_(0, torch.arange(0, 600, 3), 0.0)
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, **options)
    guessed = Guessed(monkeypatch)
    ours = evaluate(fused_linear_vgs_loss, problem, **options, backend="torch", workspace_bytes=2**30)
    assert_gradients_close(ours, exact, rtol=float32_bars(problem, exact, vgs_oracle, **options))
    gate = ours.output.gate
    assert (ours.gradients["student_text_hidden"][~gate] == 0).all()
    ((wrong, taken_back),) = guessed.counts
    if order == "shuffled":
        assert 0 < wrong < 0.06 * 600
    else:
        assert wrong > 60 and taken_back == (wrong if order == "ascending" else 0)


@pytest.mark.parametrize("backend", ["torch", "loops"])
def test_a_wrong_guess_of_what_is_not_finite(backend):
    """A term of NaN that was added could not be taken back: it waits until the gate is known, and is not gated."""
    problem = make_problem(600, VOCAB, bias=True)
    options = {"objective": VGSObjective(lam=0.4, gamma=0.0), "backend": backend, "workspace_bytes": 2**30}
    problem = problem.rows(evaluate(fused_linear_vgs_loss, problem, **options).output.vds.argsort())
    problem.student_text_hidden[250] = torch.nan  # among the highest of the first tile, and the lowest of all
    ours = evaluate(fused_linear_vgs_loss, problem, **options)
    known = evaluate(fused_linear_vgs_loss, problem, **options, vds=ours.output.vds)
    assert ours.output.language[250].isnan() and not ours.output.gate[250]
    for name, gradient in ours.gradients.items():
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, known.gradients[name], rtol=1e-3, atol=1e-6)
