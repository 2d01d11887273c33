"""A vocabulary on several ranks against one process: loss, terms and gradients, however the columns are split."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from launch import SUPPORT, torchrun
from problems import Evaluation, evaluate, make_problem, relative_error, value_floor
from tiles import make_tile
from vocab_parallel import (
    CASES,
    GRID,
    GRID_SPLIT,
    GRID_TOKENS,
    RANDOM,
    RANKS,
    SPLITS,
    TOLERANT,
    VOCAB,
    Case,
    cases_of,
    columns_of,
    random_splits,
    terms,
)

from vgs_kernels import VGSObjective, fused_linear_divergence, fused_linear_vgs_loss, parallel
from vgs_kernels.rows import rows_torch
from vgs_kernels.rows.layout import RowTile, RunningStatistics, new_state

LIMIT = 240  # seconds; ranks that wait for each other fail by this clock


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | str], list]:
    """What ``vocab_parallel.py`` saved, by the number of ranks that shared a vocabulary."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(SUPPORT / "vocab_parallel.py", RANKS, str(folder), timeout=LIMIT, TRITON_INTERPRET="1")
    return functools.cache(lambda kind: [torch.load(path) for path in sorted(folder.glob(f"{kind}-*.pt"))])


@functools.lru_cache
def single(name: str) -> Evaluation:
    """The same call in one process."""
    case = RANDOM if name == "random" else CASES[name]
    options = {"backend": "torch"} if name == "triton" else {}
    return case.run(case.problem(), **options)


@functools.lru_cache
def exact(name: str) -> Evaluation:
    """The same call in one process, in float64."""
    case = CASES[name]
    return case.run(case.problem().to(dtype=torch.float64), backend="torch")


def assert_ranks_agree(ranks: list[tuple[dict, dict]]) -> None:
    """To the last bit: ranks that decide by these numbers must decide alike."""
    for values, gradients in ranks[1:]:
        for name, value in ranks[0][0].items():
            assert torch.equal(values[name], value), name
        for name, gradient in ranks[0][1].items():
            assert "hidden" not in name or torch.equal(gradients[name], gradient), name


def assert_same(ranks: list[tuple[dict, dict]], expected: Evaluation, split: tuple[int, ...]) -> None:
    wanted = terms(expected.output)
    for rank, (values, gradients) in enumerate(ranks):
        assert values.keys() == wanted.keys() and gradients.keys() == expected.gradients.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(values[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(
                gradients[name],
                columns_of(name, gradient, split, rank),
                rtol=1e-8,
                atol=1e-12,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def assert_as_exact(ranks: list[tuple[dict, dict]], name: str, split: tuple[int, ...]) -> None:
    """No further from float64 than one process is."""
    reference, ours = exact(name), single(name)
    floor = value_floor(CASES[name].problem())
    values, gradients = ranks[0]
    assert torch.equal(values["gate"], ours.output.gate)
    for term, value in terms(reference.output).items():
        torch.testing.assert_close(values[term].double(), value.double(), rtol=1e-5, atol=floor, msg=term)
    for key, gradient in reference.gradients.items():
        whole = gradients[key] if "hidden" in key else torch.cat([own[key] for _, own in ranks])
        assert whole.dtype == CASES[name].dtype
        bound = 1.5 * relative_error(ours.gradients[key], gradient) + 1e-6
        assert relative_error(whole, gradient) <= bound, key


@pytest.mark.parametrize(("world", "name"), [(world, name) for world in SPLITS for name in cases_of(world)])
def test_equals_one_process(saved, world, name):
    for split in SPLITS[world]:
        ranks = [results[name, split] for results in saved(world)]
        assert len(ranks) == world
        assert_ranks_agree(ranks)
        if CASES[name].dtype == torch.float64:
            assert_same(ranks, single(name), split)
        else:
            assert_as_exact(ranks, name, split)


@pytest.mark.parametrize("world", SPLITS)
def test_any_split(saved, world):
    for split in random_splits(world):
        ranks = [results["random", split] for results in saved(world)]
        assert_ranks_agree(ranks)
        assert_same(ranks, single("random"), split)


@pytest.mark.parametrize("world", SPLITS)
def test_no_token_loses_more_than_the_tolerance(saved, world):
    """Each rank leaves out columns of its own, within the tolerance of its own part of a token's gradient."""
    wanted = TOLERANT.run(TOLERANT.problem(), gradient_tolerance=0.0).gradients
    for split in SPLITS[world]:
        ranks = [results["tolerant", split] for results in saved(world)]
        assert_ranks_agree(ranks)
        (values, gradients), lost, mass = ranks[0], 0.0, 0.0
        for view in ("student_hidden", "student_text_hidden"):
            lost_here, mass_here = (wanted[view] - gradients[view]).abs().sum(1), wanted[view].abs().sum(1)
            assert (lost_here <= 0.1 * mass_here + 1e-12).all()
            lost, mass = lost + lost_here, mass + mass_here
        torch.testing.assert_close(values["gradient_lost"], lost / mass, rtol=1e-6, atol=1e-9)
        assert 0.01 < values["gradient_lost"].max() <= 0.1 and values["gradient_kept"].mean() < 1
        whole = torch.cat([own["student_weight"] for _, own in ranks])
        assert 1e-5 < relative_error(whole, wanted["student_weight"]) < 0.1


def test_quantile_over_the_data_parallel_ranks_of_a_grid(saved):
    """Two ranks share a vocabulary, two of those pairs share the quantiles of the adaptive schedule and the gate."""
    grid = saved("grid")
    problem = GRID.problem()
    pooled = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(), requires_grad=()).output.vds
    quantiles = tuple(torch.quantile(pooled, q).item() for q in (0.4, 0.7))
    alone = []
    for data, tokens in enumerate(GRID_TOKENS):
        ranks = grid[2 * data : 2 * data + 2]
        assert_ranks_agree(ranks)
        part = problem.rows(tokens)
        assert_same(ranks, GRID.run(part, vds_threshold=quantiles), GRID_SPLIT)
        alone.append(evaluate(fused_linear_vgs_loss, part, requires_grad=(), objective=VGSObjective()).output.gate)
    # each pair's own quantile would open other gates
    assert not torch.equal(torch.cat(alone), torch.cat([grid[0][0]["gate"], grid[2][0]["gate"]]))


@pytest.mark.parametrize(
    ("mistake", "answer"),
    {
        "vocab_size": r"ValueError: vocab_size .*\[1, 513\], got 514: rank 0 has 1, rank 1 has 512",
        "no vocab_size": r"ValueError: vocab_size .*got 0",
        "vocab_size of a divergence": r"ValueError: vocab_size .*got 514",
        "columns": r"ValueError: student_weight .* vocab_group: rank 0 has 1, rank 1 has 512 and 511",
        "target_ids": r"ValueError: target_ids .*\[0, 513\), got values from 0 to 513",
        "padding ids": r"ValueError: target_ids .*\[0, 7\), got values from 0 to 7",
        "process_group": r"ValueError: process_group .*vocab_group",
        "top_k": r"ValueError: top_k .*513.*got 514",
        "nothing wrong": "accepted",
    }.items(),
)
def test_every_rank_hears_of_a_mistake(saved, mistake, answer):
    for results in saved(2):
        assert re.fullmatch(f"{answer}.*", results["errors"][mistake])


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("value", ["tp", 0, -100])
def test_what_is_no_group(value):
    problem = make_problem(3, 57, device="cpu")
    with pytest.raises(TypeError, match=r"vocab_group .*ProcessGroup"):
        fused_linear_vgs_loss(*problem.args(), vocab_group=value)
    with pytest.raises(TypeError, match=r"vocab_group .*ProcessGroup"):
        rows = [(1.0, problem.teacher_hidden, problem.teacher_weight)]
        fused_linear_divergence(problem.student_hidden, problem.student_weight, rows, vocab_group=value)


@pytest.mark.parametrize("value", ["57", True, 5.0])
def test_vocab_size_of_another_type(group, value):
    with pytest.raises(TypeError, match="vocab_size"):
        fused_linear_vgs_loss(*make_problem(3, 57, device="cpu").args(), vocab_group=group, vocab_size=value)


def test_a_vocabulary_without_columns(group):
    with pytest.raises(ValueError, match=r"student_weight .*vocab_group"):
        empty = make_problem(3, 57, device="cpu")
        heads = [torch.empty(0, x.shape[1]) for x in (empty.student_weight, empty.teacher_weight)]
        args = [*empty.args()[:2], heads[0], *empty.args()[3:5], heads[1]]
        fused_linear_vgs_loss(*args, vocab_group=group)


N, DIM = 300, 24
#: What is sent, in elements: for each token, once more for each gated one, four sums for each token whose entries are
#: summed (nearly equal rows, or all mass on one entry), and gradients of hidden states.
VOLUMES = {
    "four rows": (Case(tokens=N), 17 * N + 7 * 90 + 4 * 4 + 2 * N * DIM),
    "threshold known": (Case(tokens=N, options={"vds_threshold": 0.05}), 17 * N + 7 * 85 + 4 * 4 + 2 * N * DIM),
    "frozen text": (Case({"lam": 0.0}, tokens=N), 17 * N + N * DIM),
    "adaptive": (
        Case({"lam": 0.0, "schedule": "adaptive"}, tokens=N, requires_grad=("student_weight",)),
        17 * N + 7 * N + 4 * 170,
    ),
    "folded": (
        Case({"lam": 0.0}, {"return_terms": False}, tokens=N, requires_grad=("student_hidden",)),
        8 * N + 4 * 110 + N * DIM,
    ),
    "no ids": (Case(tokens=N, options={"target_ids": None}, requires_grad=()), 16 * N),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_what_is_sent(group, monkeypatch, name):
    case, volume = VOLUMES[name]
    sent = []
    original = dist.all_reduce
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda x, *a, **k: sent.append(x.numel()) or original(x, *a, **k))
    case.run(case.problem(), vocab_group=group)
    assert sum(sent) == volume


def test_one_rank_is_no_group(group):
    case = CASES["gated"]
    ranks = case.run(case.problem(), vocab_group=group)
    assert_same([(terms(ranks.output), ranks.gradients)], single("gated"), (VOCAB,))


@settings(max_examples=50)
@example(cuts=[30, 33], four=True, masked=True, seed=0)
@example(cuts=[30, 33], four=False, masked=True, seed=0)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_statistics_of_shards_meet(cuts, four, masked, seed):
    """However columns are dealt out: none to one shard, masked ones alone to another."""
    torch.manual_seed(seed)
    tile = make_tile(3, 60, dtype=torch.float64, four=four, masked=masked)
    whole = new_state(3, four, tile.student)
    rows_torch.statistics(tile, whole)
    states = []
    edges = [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(edges):
        states.append(new_state(3, four, tile.student))
        if start < stop:
            rows = [None if row is None else row[:, start:stop] for row in tile[:4]]
            rows_torch.statistics(RowTile(*rows, *tile[4:]), states[-1])
    shards = [RunningStatistics(state) for state in states]
    maxima = torch.stack([x.common_maxima() for x in shards]).amax(0)
    for x in shards:
        x.rescale_to(maxima)
    sums = [[row.clone() for row in x.addends()] for x in shards]
    for addend, *values in zip(shards[0].addends(), *sums, strict=True):
        addend.copy_(sum(values))
    torch.testing.assert_close(states[0], whole, rtol=1e-11, atol=1e-13)
