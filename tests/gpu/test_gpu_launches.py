"""Determinism, streams, synchronisations, recompilations, graphs, memory: what an interpreter cannot get wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device import LIVE, OBJECTIVES, VOCAB, assert_bitwise, dense, logit_floor, repeated, rising_weights
from problems import (
    DEVICE,
    INPUTS,
    TRAINABLE,
    Evaluation,
    Problem,
    assert_gradients_close,
    assert_terms_close,
    evaluate,
)

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("workspace_bytes", [pytest.param(2**30, id="whole"), pytest.param(2**22, id="cut")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_call_same_bits(far, dtype, workspace_bytes, name):
    problem = far.to(dtype=dtype)
    options = {"objective": OBJECTIVES[name], "target_ids": problem.target_ids, "workspace_bytes": workspace_bytes}
    first, second = (evaluate(fused_linear_vgs_loss, problem, **options) for _ in range(2))
    assert_bitwise(second, first)


def test_side_stream_while_the_default_stream_is_busy(odd):
    """Everything runs on the caller's stream: a kernel on another one would read what is not there yet."""
    problem = odd.to(dtype=torch.bfloat16)
    options = {"objective": OBJECTIVES["constant"], "target_ids": problem.target_ids}
    expected = evaluate(fused_linear_vgs_loss, problem, **options)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # fills the stream's memory pool: an allocation may wait for the whole device
        evaluate(fused_linear_vgs_loss, problem, **options)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # cycles: about two seconds on the default stream
    with torch.cuda.stream(side):
        assert_bitwise(evaluate(fused_linear_vgs_loss, problem, **options), expected)
    assert not torch.cuda.default_stream().query(), "the default stream had to be busy all along"
    torch.cuda.synchronize()


def divergence(problem: Problem, **options: Any) -> Any:
    target = [
        (1.0, problem.teacher_hidden, problem.teacher_weight),
        (0.5, problem.student_text_hidden, problem.student_weight),
        (-0.5, problem.teacher_text_hidden, problem.teacher_weight),
    ]
    return fused_linear_divergence(
        problem.student_hidden, problem.student_weight, target, target_ids=problem.target_ids, **options
    )


def with_policy(problem: Problem) -> Any:
    weights = rising_weights(problem.tokens)
    policy = PolicyTerm(advantages=1 - weights, weights=weights, old_logps=-weights)
    options = {"target_ids": problem.target_ids, "policy": policy}
    loss = fused_linear_vgs_loss(*problem.args(), **options).loss
    return SimpleNamespace(loss=loss + divergence(problem, divergence="jsd", policy=policy).loss)


def every_divergence(problem: Problem) -> Any:
    """All ways through the entry kernels in one loss."""
    total = divergence(problem, reduction="none").loss.sum()
    for options in (
        {"divergence": "forward_kl"},
        {"divergence": "jsd"},
        {"divergence": "jsd", "support": "teacher_top_k", "top_k": 64, "clip": 0.05},
        {"divergence": "jsd", "support": "student_top_k", "top_k": 64},
        {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.1},
        {"divergence": "sampled_reverse_kl", "token_clip": 10.0},
    ):
        total = total + divergence(problem, **options).loss
    s, _, t, w = dense(problem)
    of_tokens = rising_weights(problem.tokens)
    for options in ({}, {"divergence": "jsd", "support": "teacher_top_k", "top_k": 64}):
        total = total + divergence_loss(s, [(1.0, t), (of_tokens, w)], vocab_size=s.shape[1] - 1, **options).loss
    return SimpleNamespace(loss=total)


def fused(**options: Any) -> Callable[[Problem], Any]:
    return lambda problem: fused_linear_vgs_loss(*problem.args(), **options)


CALLS: dict[str, Callable[[Problem], Any]] = {
    "default": fused(),
    "target ids": lambda p: fused_linear_vgs_loss(*p.args(), target_ids=p.target_ids),
    "adaptive": fused(objective=OBJECTIVES["adaptive"]),
    "live prior": fused(objective=LIVE),
    "soft-cap": fused(student_softcap=20.0, teacher_softcap=30.0),
    "folded": fused(objective=VGSObjective(lam=0.0), return_terms=False),
    "weights and scores": lambda p: fused_linear_vgs_loss(
        *p.args(), token_weights=rising_weights(p.tokens), vds=rising_weights(p.tokens)
    ),
    "vocabulary cut": fused(workspace_bytes=2**22),
    "divergence": divergence,
    "every divergence": every_divergence,
    "policy": with_policy,
    "logits": lambda p: vgs_loss(*dense(p)),
    "logits, adaptive": lambda p: vgs_loss(*dense(p), objective=OBJECTIVES["adaptive"], target_ids=p.target_ids),
}


@contextlib.contextmanager
def synchronisation_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_synchronisation_is_noticed():
    """Guards the test below."""
    with pytest.raises(RuntimeError, match="synchroniz"), synchronisation_is_an_error():
        torch.ones(3, device=DEVICE).sum().item()


@pytest.mark.parametrize("name", CALLS)
def test_no_host_synchronisation(odd, name):
    """Forward and backward only launch: the host runs ahead of the device."""
    problem = odd.rows(slice(0, 256)).to(dtype=torch.bfloat16)  # of more tokens those that were guessed are counted
    CALLS[name](problem.leaves()).loss.backward()  # compiles, and sets up cuBLAS
    leaves = problem.leaves()
    torch.cuda.synchronize()
    with synchronisation_is_an_error():
        out = CALLS[name](leaves)
        out.loss.backward()
        if hasattr(out, "metrics"):
            out.metrics()
    assert leaves.student_hidden.grad.any()


@pytest.mark.parametrize("scope", ["guessed", "threshold", "trajectory", "ranks"])
def test_documented_synchronisation(odd, scope):
    """Where no quantile of the call bounds the gated tokens, or they were guessed, the host waits to count them."""
    problem = odd.to(dtype=torch.bfloat16)
    if scope == "guessed":
        options: dict[str, Any] = {}
    elif scope == "threshold":
        options = {"vds_threshold": torch.tensor(0.1, device=DEVICE)}
    else:
        options = {"objective": VGSObjective(vds_scope=scope)}
        options |= {"trajectory_ids": torch.arange(problem.tokens, device=DEVICE) % 7} if scope == "trajectory" else {}
    evaluate(fused_linear_vgs_loss, problem, **options)
    with pytest.raises(RuntimeError, match="synchroniz"), synchronisation_is_an_error():
        fused_linear_vgs_loss(*problem.leaves().args(), **options)
    with synchronisation_is_an_error():  # a frozen text-only path and head need no gated tokens
        fused_linear_vgs_loss(*problem.leaves(TRAINABLE[:1]).args(), **options).loss.backward()


def compiled_kernels() -> int:
    """Compilations that the Triton kernels hold. An entry of ``device_caches`` starts with them in 3.6 and 3.7."""
    from vgs_kernels.rows import entries_triton, rows_triton

    kernels = (rows_triton.statistics_kernel, rows_triton.merge_kernel, entries_triton.gradient_kernel)
    return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_lengths_do_not_recompile(far, dtype, name):
    """One compilation serves every number of tokens, whatever the vocabulary; up to 256 and beyond."""
    problem = far.to(dtype=dtype)
    for tokens in (64, 320):
        CALLS[name](repeated(problem, tokens).leaves()).loss.backward()
    before = compiled_kernels()
    assert before > 0
    for tokens in (1, 16, 17, 128, 255, 300, 1000, 2049):
        CALLS[name](repeated(problem, tokens).leaves()).loss.backward()
        assert compiled_kernels() == before, tokens


@pytest.mark.parametrize("name", OBJECTIVES)
def test_cuda_graph(odd, name):
    """Captured once with static inputs, replayed with others."""
    problem = odd.to(dtype=torch.bfloat16)
    first, other = problem.rows(slice(0, 150)), problem.rows(slice(150, 300))
    other = replace(
        other, student_weight=other.student_weight.roll(1, 0), teacher_weight=other.teacher_weight.roll(1, 0)
    )
    static = replace(first.leaves(), target_ids=first.target_ids.clone())

    def step() -> Any:
        out = fused_linear_vgs_loss(*static.args(), objective=OBJECTIVES[name], target_ids=static.target_ids)
        out.loss.backward()
        return out

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    for key in TRAINABLE[:3]:
        getattr(static, key).grad = None  # allocated anew, from the graph's own pool
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()

    for inputs in (other, first, other):
        with torch.no_grad():
            for key in (*INPUTS, "target_ids"):
                getattr(static, key).copy_(getattr(inputs, key))
        graph.replay()
        torch.cuda.synchronize()
        ours = Evaluation(out, {key: getattr(static, key).grad for key in TRAINABLE[:3]})
        expected = evaluate(fused_linear_vgs_loss, inputs, objective=OBJECTIVES[name], target_ids=inputs.target_ids)
        assert_terms_close(ours.output, expected.output, rtol=1e-5, floor=logit_floor(inputs))
        torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=10 * logit_floor(inputs))
        assert_gradients_close(ours, expected, rtol=torch.finfo(torch.bfloat16).eps)


#: [N] vectors, sixteen float32 statistics and their float64 copies; hidden states of a tile or a gradient block.
TOKEN_BYTES = 2048
#: cuBLAS takes 32 MiB, and the allocator leaves up to a MiB unused behind each large block.
SLACK = 40 * 2**20


def scratch(tokens: int, objective: VGSObjective, workspace_bytes: int) -> tuple[int, int]:
    """Bytes at the peak of forward and of backward beside the inputs and the gradients."""
    sizes = [(tokens, 256), (tokens, 256), (VOCAB, 256), (tokens, 512), (tokens, 512), (VOCAB, 512)]
    leaves = [torch.randn(size, dtype=torch.bfloat16, device=DEVICE).requires_grad_() for size in sizes]
    trainable = sum(leaf.numel() for leaf in leaves[:3])
    options = {"objective": objective, "workspace_bytes": workspace_bytes}
    fused_linear_vgs_loss(*leaves, **options).loss.backward()  # cuBLAS allocates its workspace once
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = fused_linear_vgs_loss(*leaves, **options)
    forward = torch.cuda.max_memory_allocated() - before - 4 * trainable  # gradients are collected in float32
    torch.cuda.reset_peak_memory_stats()
    out.loss.backward()
    return forward, torch.cuda.max_memory_allocated() - before - (4 + 2) * trainable


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("workspace_bytes", [2**30, 2**28])
def test_peak_memory(workspace_bytes, name):
    peaks = {}
    for tokens in (1024, 16_384):
        peaks[tokens], backward = scratch(tokens, OBJECTIVES[name], workspace_bytes)
        assert 0 < peaks[tokens] <= workspace_bytes + SLACK + TOKEN_BYTES * tokens, tokens
        assert backward <= SLACK + TOKEN_BYTES * tokens, tokens
    if workspace_bytes == 2**28:  # full with either number of tokens
        assert peaks[16_384] - peaks[1024] <= SLACK + TOKEN_BYTES * (16_384 - 1024)
