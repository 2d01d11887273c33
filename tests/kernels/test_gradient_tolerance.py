"""Gradients on the columns that matter: no token loses more than the tolerance, whatever its row looks like.

The student's head is the identity: the gradient of a hidden state is then that of its logits, and what is left out of
the products can be read off entry by entry, against the same call without a tolerance.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DEVICE, make_problem

from vgs_kernels import (
    Divergence,
    FusedLinearVGSLoss,
    PolicyTerm,
    VGSObjective,
    arguments,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    operators,
    vgs_loss,
)
from vgs_kernels import active_columns as columns
from vgs_kernels.active_columns import SHARES, active_columns, row_sums

N, V, DT = 24, 1200, 16


# --- one block of gradients -------------------------------------------------------------------------------------------


def softmax_gradient(logits: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """p * (x - E[x]) of random x, as of a divergence."""
    p = logits.softmax(1)
    x = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=logits.dtype)
    return p * (x - (p * x).sum(1, keepdim=True))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def lost_share(block: torch.Tensor, active: torch.Tensor | None) -> float:
    """The largest share of its L1 mass that a token loses, in float64."""
    left = block.double().abs()
    mass = left.sum(1)
    if active is None:
        return 0.0
    left[:, active] = 0
    return (left.sum(1) / torch.where(mass > 0, mass, 1)).max().item()


def peaked(columns: int = 12_000, spread: float = 6.0, rows: int = 32) -> torch.Tensor:
    # half of the spread is common to all rows, as the frequency of words is
    return softmax_gradient(spread * (0.9 * normal(1, columns) + 0.4 * normal(rows, columns, seed=2)))


def hidden_from_samples(columns: int = 12_000) -> torch.Tensor:
    """Tiny where the sample looks, so that a threshold taken from it would let everything go."""
    block = torch.full((8, columns), 1e-3)
    block[:, torch.arange(columns) % 1024 < 64] = 1e-9
    return block * normal(8, columns).sign()


def with_rows(block: torch.Tensor, **rows: torch.Tensor | float) -> torch.Tensor:
    for index, row in enumerate(rows.values()):
        block[index] = row
    return block


def masked() -> torch.Tensor:
    block = peaked()
    block[:, 100:9000] = 0  # columns of -inf
    return block


#: Blocks of which columns can be spared, and those of which none can: all is needed, or not all is finite.
SPARSE = {
    "peaked": peaked,
    "very peaked": lambda: peaked(spread=20.0),
    "few columns": lambda: peaked(columns=700),
    "one column": lambda: peaked()[:, :1].expand(-1, 1).new_zeros(3, 1),
    "float64": lambda: softmax_gradient(8 * normal(1, 9000, dtype=torch.float64).expand(16, -1)),
    "bfloat16": lambda: peaked().bfloat16(),
    "float16": lambda: (1000 * peaked()).half(),
    "zeros": lambda: torch.zeros(5, 5000),
    "a token of weight 0": lambda: with_rows(peaked(), nothing=0.0),
    "masked columns": masked,
}
DENSE = {
    "flat": lambda: softmax_gradient(0.1 * normal(32, 12_000)),
    "tied": lambda: torch.full((8, 12_000), 1e-5),
    "one token needs all": lambda: with_rows(peaked(), flat=1e-5),
    "NaN": lambda: with_rows(peaked(), broken=torch.where(torch.arange(12_000) == 7, torch.nan, 1e-6)),
    "infinite": lambda: with_rows(peaked(), broken=torch.where(torch.arange(12_000) == 7, torch.inf, 0.0)),
    "hidden from samples": hidden_from_samples,
    "least numbers": lambda: torch.eye(3, 5000) * 1e-45,  # a threshold below them is 0
}


#: Blocks that are of no interest to the kernels: float64, which they do not take, and those alike.
ONE_BACKEND = {"float64", "very peaked", "one column", "tied"}


def kernels():
    """The passes in Triton, here by its interpreter."""
    from vgs_kernels.rows import columns_triton, rows_triton

    if not rows_triton.supports(torch.device(DEVICE)):
        pytest.skip("needs the Triton interpreter")
    return columns_triton.PASSES


@pytest.mark.parametrize("tolerance", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("name", SPARSE)
def test_a_block_keeps_the_bound(name, tolerance):
    block = SPARSE[name]().to(DEVICE)
    active = active_columns(block, row_sums(block)[0], tolerance)
    assert active is not None or (tolerance == 1e-4 and name in ("few columns", "peaked", "bfloat16", "float16"))
    assert lost_share(block, active) <= tolerance


@pytest.mark.parametrize("caution", [0.75, 4.0])
@pytest.mark.parametrize("name", [name for name in SPARSE if name not in ONE_BACKEND])
def test_kernels_find_the_same_columns(monkeypatch, name, caution):
    """Also where a guess leaves too much out, and tokens are looked at again."""
    passes, block = kernels(), SPARSE[name]().to(DEVICE)
    monkeypatch.setattr(columns, "_CAUTION", caution)
    block = torch.cat([block, torch.full_like(block, torch.nan)], 1)[:, : block.shape[1]]  # nothing behind it is read
    mass = passes.row_sums(block)
    torch.testing.assert_close(mass, row_sums(block), rtol=1e-5, atol=1e-6 * mass[0].max().item())
    active = active_columns(block, mass[0], 1e-2, passes)
    assert lost_share(block, active) <= 1e-2
    wanted = active_columns(block, mass[0], 1e-2)
    assert set(active.tolist()) ^ set(wanted.tolist()) <= set(active[:2].tolist())  # sums may be rounded otherwise


@pytest.mark.parametrize("name", DENSE)
def test_a_block_that_is_needed_whole(name):
    block = DENSE[name]().to(DEVICE)
    assert active_columns(block, row_sums(block)[0], 1e-3) is None


@pytest.mark.parametrize("name", [name for name in DENSE if name not in ONE_BACKEND])
def test_a_block_that_kernels_need_whole(name):
    passes, block = kernels(), DENSE[name]().to(DEVICE)
    assert active_columns(block, passes.row_sums(block)[0], 1e-3, passes) is None


def test_most_of_what_can_go_goes():
    """At most twice the columns that sorting would keep, and some of the tolerance is used."""
    block = peaked(40_000, spread=5.0, rows=1)
    least = (block.abs().sort(1).values.cumsum(1) > 1e-2 * block.abs().sum(1, keepdim=True)).sum().item()
    active = active_columns(block, row_sums(block)[0], 1e-2)
    assert least <= len(active) <= 2 * least < 10_000
    assert lost_share(block, active) > 1e-3


@settings(max_examples=150)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 63, 1000, 5000, 9000]),
    st.floats(0, 30),
    st.floats(0, 1),
    st.sampled_from([1e-5, 1e-3, 1e-1, 0.9]),
    st.integers(-149, 20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 2**16),
)
def test_any_block(rows, columns, spread, common, tolerance, exponent, dtype, seed):
    logits = spread * (common * normal(1, columns, seed=seed) + (1 - common) * normal(rows, columns, seed=seed + 1))
    block = (softmax_gradient(logits) * 2.0**exponent).to(dtype)
    active = active_columns(block, row_sums(block)[0], tolerance)
    assert lost_share(block, active) <= tolerance


# --- whole calls ------------------------------------------------------------------------------------------------------


class Inputs:
    """Peaked rows of N tokens, a student whose head is the identity."""

    def __init__(self, dtype: torch.dtype = torch.float64, spread: float = 5.0, tokens: int = N) -> None:
        common = normal(1, V, dtype=dtype)
        student = spread * (common + 0.3 * normal(tokens, V, seed=1, dtype=dtype))
        self.student, self.text = (
            x.requires_grad_() for x in (student, student + spread * 0.2 * normal(tokens, V, seed=2, dtype=dtype))
        )
        self.head = torch.eye(V, dtype=dtype, requires_grad=True)
        self.bias = torch.zeros(V, dtype=dtype, requires_grad=True)
        self.teacher_head = normal(V, DT, seed=3, dtype=dtype)
        self.teacher_head[:, :1] = spread * common.T
        self.teacher, self.teacher_text = (normal(tokens, DT, seed=x, dtype=dtype) / 3 for x in (4, 5))
        self.teacher[:, 0] = self.teacher_text[:, 0] = 1

    def vgs(self, **options: Any) -> Any:
        rows = (self.student, self.text, self.head, self.teacher, self.teacher_text, self.teacher_head)
        return fused_linear_vgs_loss(*rows, student_bias=self.bias, **options)

    def divergence(self, **options: Any) -> Any:
        target = [(1.0, self.teacher, self.teacher_head)]
        return fused_linear_divergence(self.student, self.head, target, student_bias=self.bias, **options)

    def gradients(self, function: str, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        output = getattr(self, function)(**options)
        output.loss.sum().backward()
        leaves = {name: getattr(self, name) for name in ("student", "text", "head", "bias")}
        found = {name: x.grad for name, x in leaves.items() if x.grad is not None}
        for x in leaves.values():
            x.grad = None
        return output, found


IDS = torch.arange(N) * 7 % V
POLICY = PolicyTerm(torch.linspace(-1, 1, N).double(), torch.full((N,), 0.1).double())
#: (method of the inputs, options).
LOSSES = {
    "vgs": ("vgs", {}),
    "vgs, threshold known": ("vgs", {"vds_threshold": 0.05}),
    "vgs, live prior": ("vgs", {"objective": VGSObjective(detach_prior=False, lam=0.0)}),
    "vgs, adaptive": ("vgs", {"objective": VGSObjective(schedule="adaptive")}),
    "vgs, folded": ("vgs", {"objective": VGSObjective(lam=0.0), "return_terms": False}),
    "vgs, policy": ("vgs", {"policy": POLICY, "target_ids": IDS}),
    "vgs, soft-cap": ("vgs", {"student_softcap": 30.0}),
    "reverse KL": ("divergence", {}),
    "forward KL": ("divergence", {"divergence": "forward_kl"}),
    "JSD": ("divergence", {"divergence": "jsd", "clip": 0.05}),
    "top k and tail": ("divergence", {"support": "student_top_k", "top_k": 100}),
    "sampled": ("divergence", {"divergence": "sampled_reverse_kl", "target_ids": IDS}),
}
WORKSPACES = {"whole": 2**30, "cut": 2**20}


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_token_loses_more(name, workspace, tolerance=0.02):
    function, options = LOSSES[name]
    inputs, options = Inputs(), {"workspace_bytes": WORKSPACES[workspace], **options}
    exact, wanted = inputs.gradients(function, **options)
    output, found = inputs.gradients(function, gradient_tolerance=tolerance, **options)
    assert torch.equal(output.loss, exact.loss)
    mass = lost = tail = 0.0
    for view in {"student", "text"} & wanted.keys():
        mass_here, left = wanted[view].abs().sum(1), wanted[view] - found[view]
        assert (left.abs().sum(1) <= tolerance * mass_here).all()
        mass, lost, tail = mass + mass_here, lost + left.abs().sum(1), tail + left.sum(1)
    assert (lost > 0).any()
    share = torch.where(mass > 0, 1 / mass, 0)
    torch.testing.assert_close(output.gradient_lost, lost * share, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(output.gradient_tail, tail * share, rtol=1e-6, atol=1e-9)
    assert (output.gradient_kept > 0).any() and output.gradient_kept.mean() < 0.9
    # The head's gradient has lost the same entries, and a bias's none.
    left = sum((wanted[x] - found[x]).T @ getattr(inputs, x).detach() for x in {"student", "text"} & wanted.keys())
    torch.testing.assert_close(wanted["head"] - found["head"], left, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found["bias"], wanted["bias"], rtol=0, atol=0)


def test_terms_that_were_formed_by_a_wrong_guess():
    """Tokens in ascending order of their VDS: many of the first tile are misjudged."""
    inputs = Inputs(torch.float32, tokens=300)
    with torch.no_grad():
        order = inputs.vgs().vds.argsort()
    inputs.teacher, inputs.teacher_text = inputs.teacher[order], inputs.teacher_text[order]
    exact, wanted = inputs.gradients("vgs")
    _, found = inputs.gradients("vgs", gradient_tolerance=0.02)
    left, mass = ((x.double()).abs().sum(1) for x in (wanted["text"] - found["text"], wanted["text"]))
    assert (left <= 0.02 * mass).all() and (left > 0).any()
    assert (found["text"][~exact.gate] == 0).all()


@pytest.mark.parametrize("frozen", [("head", "bias"), ("student", "text")])
def test_a_frozen_side(frozen):
    inputs, whole = Inputs(), Inputs()
    for name in frozen:
        getattr(inputs, name).requires_grad_(False)
    output, found = inputs.gradients("vgs", gradient_tolerance=0.02)
    _, wanted = whole.gradients("vgs", gradient_tolerance=0.02)
    assert found.keys() == wanted.keys() - set(frozen)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)
    assert output.gradient_kept.mean() < 0.9


def test_blocks_of_16_bits(monkeypatch):
    """As on a GPU: gradients of several tiles are rounded to 16 bits and collected before the products."""
    monkeypatch.setattr(arguments, "gradient_dtype", lambda *_: torch.bfloat16)
    inputs, options = Inputs(torch.float32), {"target_ids": IDS, "workspace_bytes": 2**19}
    _, wanted = inputs.gradients("divergence", **options)
    output, found = inputs.gradients("divergence", gradient_tolerance=0.02, **options)
    left = (wanted["student"] - found["student"]).double().abs().sum(1)
    assert (left <= 0.02 * wanted["student"].double().abs().sum(1)).all()
    assert 0 < output.gradient_lost.max() <= 0.02


def test_flat_rows_are_multiplied_whole():
    """To the last bit as without a tolerance."""
    inputs = Inputs(torch.float32, spread=0.1)
    _, wanted = inputs.gradients("vgs")
    output, found = inputs.gradients("vgs", gradient_tolerance=1e-3)
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert (output.gradient_kept == 1).all() and (output.gradient_lost == 0).all()


def test_a_mean_of_all_and_the_worst():
    weights = torch.ones(N).index_fill_(0, torch.arange(5), 0.0)
    output, _ = Inputs().gradients("vgs", gradient_tolerance=0.02, token_weights=weights)
    metrics = output.metrics()
    assert (output.gradient_lost[:5] == 0).all()
    assert metrics["gradient_lost_max"] == output.gradient_lost.max() > metrics["gradient_lost"] > 0
    torch.testing.assert_close(metrics["gradient_lost"], output.gradient_lost[5:].float().mean())


def test_broken_rows_reach_the_gradient():
    inputs = Inputs()
    inputs.student.data[3, 17] = torch.nan
    _, found = inputs.gradients("divergence", gradient_tolerance=0.1)
    assert found["student"][3].isnan().all() and found["head"].isnan().any()


def test_no_tolerance_says_nothing():
    inputs = Inputs()
    output, exact = inputs.gradients("vgs", gradient_tolerance=0.0)
    _, wanted = inputs.gradients("vgs")
    assert all(torch.equal(exact[name], gradient) for name, gradient in wanted.items())
    assert all(getattr(output, name) is None for name in SHARES)
    with torch.no_grad():  # nothing is multiplied, so nothing is lost
        assert inputs.vgs(gradient_tolerance=0.1).gradient_lost is None


@pytest.mark.parametrize("count", [0, 1])
def test_few_tokens(count):
    problem = make_problem(count, 57, device="cpu")
    args = [x.requires_grad_() for x in problem.args()[:3]] + list(problem.args()[3:])
    output = FusedLinearVGSLoss(gradient_tolerance=0.1)(*args)
    output.loss.backward()
    assert output.gradient_lost.shape == (count,)
    assert all(x.grad is not None for x in args[:3])


def test_unreduced_losses():
    inputs = Inputs()
    upstream = torch.linspace(0.1, 1, N).double()
    weights = {"token_weights": upstream, "gradient_tolerance": 0.02}
    _, wanted = inputs.gradients("divergence", **weights)
    output = inputs.divergence(reduction="none", gradient_tolerance=0.02)
    assert output.gradient_lost is None  # gradients are formed in the backward
    (output.loss * upstream).sum().backward()
    torch.testing.assert_close(inputs.student.grad, wanted["student"], rtol=1e-9, atol=1e-12)


def test_compiled_and_never_in_a_graph_of_launches(monkeypatch):
    inputs = Inputs(torch.float32)
    _, wanted = inputs.gradients("divergence", gradient_tolerance=0.02)
    compiled = torch.compile(lambda: inputs.divergence(gradient_tolerance=0.02), backend="aot_eager", fullgraph=True)
    output = compiled()
    output.loss.backward()
    torch.testing.assert_close(inputs.student.grad, wanted["student"])
    assert output.gradient_lost.shape == (N,)
    monkeypatch.setattr(operators, "loss", None)
    inputs.vgs(gradient_tolerance=0.02)
    assert torch.Tag.cudagraph_unsafe in operators.synchronising_loss.tags


@pytest.mark.parametrize(
    ("value", "error"), [(-0.1, ValueError), (1.0, ValueError), (math.nan, ValueError), ("1e-3", TypeError)]
)
def test_what_is_no_tolerance(value, error):
    with pytest.raises(error, match="gradient_tolerance must be"):
        Inputs().vgs(gradient_tolerance=value)


def test_logits_have_no_products_to_spare():
    rows = [normal(3, 11) for _ in range(4)]
    with pytest.raises(TypeError, match="gradient_tolerance"):
        vgs_loss(*rows, gradient_tolerance=1e-3)
    with pytest.raises(TypeError, match="gradient_tolerance"):
        divergence_loss(rows[0], [(1.0, rows[1])], gradient_tolerance=1e-3)
    assert "gradient_tolerance" not in Divergence.__dataclass_fields__
