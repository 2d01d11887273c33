"""``vds_scope="ranks"``: one quantile over the tokens of all processes, also when one of them has none."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import vgs_oracle
from problems import assert_gradients_close, assert_terms_close, evaluate, make_problem

from vgs_kernels import VGSObjective, fused_linear_vgs_loss

TOKENS, RANKS = 13, 2
SPLITS = [(5, 8), (13, 0), (0, 13), (0, 0), (12, 1)]
SETTINGS = {
    "constant": VGSObjective(lam=0.5, vds_scope="ranks"),
    "adaptive": VGSObjective(lam=0.5, vds_scope="ranks", schedule="adaptive"),
}
#: Tokens that do not take part, the last rank's first one included; their states are NaN.
LEFT_OUT = [1, 5, 6, 12]
LIMIT = 90  # seconds; a rank that waits for another forever fails by this clock


def share(problem, split, rank):
    start = sum(split[:rank])
    return problem.rows(slice(start, start + split[rank]))


def with_left_out():
    """The problem and its token weights."""
    problem = make_problem(TOKENS, 57, dtype=torch.float64, device="cpu")
    weights = torch.full((TOKENS,), 0.1, dtype=torch.float64)
    weights[LEFT_OUT] = 0
    for name in ("student_hidden", "student_text_hidden", "teacher_hidden", "teacher_text_hidden"):
        getattr(problem, name)[LEFT_OUT] = torch.nan
    return problem, weights


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=LIMIT),
    )
    problem = make_problem(TOKENS, 57, dtype=torch.float64, device="cpu")
    results = {}
    for split in SPLITS:
        for name, setting in SETTINGS.items():
            out = evaluate(fused_linear_vgs_loss, share(problem, split, rank), objective=setting)
            results[split, name] = (out.loss, out.output.gate, out.gradients)
            spoilt, weights = with_left_out()
            own = weights[sum(split[:rank]) :][: split[rank]]
            out = evaluate(fused_linear_vgs_loss, share(spoilt, split, rank), objective=setting, token_weights=own)
            results[split, name, "left out"] = (out.loss, out.output.gate, out.gradients)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    context = mp.spawn(worker, args=(str(folder),), nprocs=RANKS, join=False)
    deadline = time.monotonic() + LIMIT
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the ranks wait for each other")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes(results, split, name):
    problem = make_problem(TOKENS, 57, dtype=torch.float64, device="cpu")
    pool = vgs_oracle(*problem.args(), objective=SETTINGS[name]).vds
    for rank in range(RANKS):
        loss, gate, gradients = results[rank][split, name]
        own = share(problem, split, rank)
        exact = evaluate(vgs_oracle, own, objective=SETTINGS[name], vds_pool=pool)
        assert torch.equal(gate, exact.output.gate)
        torch.testing.assert_close(loss, exact.loss, rtol=1e-9, atol=1e-12, check_dtype=False)
        for key, gradient in gradients.items():
            wanted = exact.gradients[key]
            wanted = torch.zeros_like(gradient) if wanted is None else wanted
            torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("split", SPLITS)
def test_tokens_that_do_not_take_part(results, split, name):
    """They are in nobody's quantile, and a rank may have no others."""
    problem, weights = with_left_out()
    kept = weights != 0
    pool = vgs_oracle(*problem.rows(kept).args(), objective=SETTINGS[name]).vds
    for rank in range(RANKS):
        loss, gate, gradients = results[rank][split, name, "left out"]
        own = kept[sum(split[:rank]) :][: split[rank]]
        part = share(problem, split, rank).rows(own)
        weight = torch.full((part.tokens,), 0.1, dtype=torch.float64)
        exact = evaluate(vgs_oracle, part, objective=SETTINGS[name], vds_pool=pool, token_weights=weight)
        assert torch.equal(gate[own], exact.output.gate) and not gate[~own].any()
        torch.testing.assert_close(loss, exact.loss, rtol=1e-9, atol=1e-12, check_dtype=False)
        for key, gradient in gradients.items():
            if "hidden" in key:
                assert not gradient[~own].any()
                gradient = gradient[own]
            wanted = exact.gradients[key]
            wanted = torch.zeros_like(gradient) if wanted is None else wanted
            torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


def test_the_shared_quantile_differs_from_each_own():
    """Guards the test above: with the quantile of its own tokens a rank would open other gates."""
    problem = make_problem(TOKENS, 57, dtype=torch.float64, device="cpu")
    setting = SETTINGS["constant"]
    whole = vgs_oracle(*problem.args(), objective=setting).gate
    parts = [vgs_oracle(*share(problem, SPLITS[0], rank).args(), objective=setting).gate for rank in range(RANKS)]
    assert not torch.equal(whole, torch.cat(parts))


@pytest.fixture
def single_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("explicit", [False, True])
def test_one_process(single_rank, explicit):
    problem = make_problem(11, 57, dtype=torch.float64, device="cpu")
    group = {"process_group": single_rank} if explicit else {}
    call = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(lam=0.5))
    ranks = evaluate(fused_linear_vgs_loss, problem, objective=VGSObjective(lam=0.5, vds_scope="ranks"), **group)
    assert_terms_close(ranks.output, call.output, rtol=1e-12, floor=1e-14)
    assert_gradients_close(ranks, call, rtol=1e-12)
