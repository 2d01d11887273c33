"""Large blocks of a CPU are kept for the next call: the same numbers, nothing shared, nothing kept that is in use."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from vgs_kernels import VGSObjective, fused_linear_divergence, fused_linear_vgs_loss, release_workspace, workspace
from vgs_kernels.workspace import Workspace

pytestmark = pytest.mark.skipif(
    workspace._advise() is None, reason="nothing is kept where a system cannot be told that it may take memory back"
)
N, V, D = 48, 4096, 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_LEAST_BYTES", 1 << 12)
    release_workspace()
    yield
    release_workspace()


def rows(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"s": (N, D), "a": (N, D), "t": (N, D), "w": (N, D), "student": (V, D), "teacher": (V, D)}
    return {name: torch.randn(size, generator=generator) * scale for name, size in sizes.items()}


def vgs(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Loss and gradients of four rows with language preservation in the same tiles."""
    leaves = [x[name].clone().requires_grad_() for name in ("s", "a", "student")]
    objective = VGSObjective(lam=0.5)
    loss = fused_linear_vgs_loss(*leaves, x["t"], x["w"], x["teacher"], objective=objective, vds_threshold=0.1).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def jsd(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x[name].clone().requires_grad_() for name in ("s", "student")]
    loss = fused_linear_divergence(*leaves, [(1.0, x["t"], x["teacher"])], divergence="jsd").loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def nearly_equal(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A KL that is summed by entries of a copy of its tokens."""
    student = x["s"].clone().requires_grad_()
    loss = fused_linear_divergence(student, x["student"], [(1.0, x["s"] * 1.001, x["student"])]).loss
    return [loss.detach(), *torch.autograd.grad(loss, [student])]


def kept() -> dict[int, int]:
    return {block.data_ptr(): block.nbytes for block in workspace._FREE.values()}


@pytest.mark.parametrize("call", [vgs, jsd, nearly_equal])
def test_later_calls_take_what_earlier_ones_left(call: Callable) -> None:
    """Other numbers are left in it by another call, larger by far, and NaN by hand."""
    first = call(rows(0))
    before = kept()
    assert before, "some is kept"
    call(rows(1, scale=30.0))
    for block in workspace._FREE.values():
        block.view(torch.float32).fill_(torch.nan)
    again = call(rows(0))
    assert kept() == before, "no new block"
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_block_that_somebody_holds_is_not_kept() -> None:
    memory, like = Workspace(), torch.empty(0)
    free, held = (memory.empty(like, 4, 1024) for _ in range(2))
    address = free.data_ptr()
    assert held.shape == (4, 1024) and held.dtype == torch.float32
    del free
    memory.close()
    assert list(kept()) == [address]
    with Workspace() as other:
        assert other.empty(like, 1024).data_ptr() == address != held.data_ptr(), "a larger one serves"
        assert kept() == {}
    assert list(kept()) == [address]


def test_an_error_in_a_call_leaves_nothing_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vgs(rows(0))
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("vgs_kernels.steering.VGSLoss.settle", interrupted)
        vgs(rows(1))
    assert all(torch.equal(x, y) for x, y in zip(vgs(rows(0)), expected, strict=True))


def test_no_more_is_kept_than_one_call_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_KEPT_BYTES", 100_000)
    sizes = [10_000, 40_000, 20_000, 50_000]
    with Workspace() as memory:
        addresses = {size: memory.empty(torch.empty(0, dtype=torch.uint8), size).data_ptr() for size in sizes}
    assert kept() == {addresses[size]: size for size in (40_000, 50_000)}, "the smallest go first"
    assert release_workspace() == 90_000 and release_workspace() == 0


def test_inference_mode_leaves_blocks_that_training_can_write_to() -> None:
    x = rows(0)
    with torch.inference_mode():
        value = fused_linear_divergence(x["s"], x["student"], [(1.0, x["t"], x["teacher"])], divergence="jsd").loss
    assert kept()
    found = jsd(x)
    assert torch.equal(found[0], value)


def test_calls_of_several_threads_share_no_block() -> None:
    problems = [rows(seed) for seed in range(4)]
    expected, found = [vgs(x) for x in problems], {}

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = vgs(problems[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in enumerate(expected):
        assert all(torch.equal(x, y) for x, y in zip(found[index], values, strict=True))


def test_devices_with_an_allocator_of_their_own_keep_theirs() -> None:
    with Workspace() as memory:
        assert memory.empty(torch.empty(0, device="meta"), 1 << 20).device.type == "meta"
    assert kept() == {}
