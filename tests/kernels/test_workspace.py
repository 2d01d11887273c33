"""Large blocks of a CPU are kept for the next call: the same numbers, nothing shared, nothing kept that is in use."""

from __future__ import annotations

import copy
import ctypes
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from vgs_kernels import VGSObjective, fused_linear_divergence, fused_linear_vgs_loss, release_workspace, workspace
from vgs_kernels.workspace import large_empty

pytestmark = pytest.mark.skipif(
    not workspace._KEEPS, reason="nothing is kept where a system cannot be told that it may take memory back"
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
    """Address -> bytes of the free blocks."""
    return {ctypes.addressof(ctypes.c_char.from_buffer(block)): len(block) for block in workspace._FREE.values()}


@pytest.mark.parametrize("call", [vgs, jsd, nearly_equal])
def test_later_calls_take_what_earlier_ones_left(call: Callable) -> None:
    """Numbers of another call, larger by far, are left in it, and NaN by hand."""
    expected = [x.clone() for x in call(rows(0))]
    call(rows(1, scale=30.0))
    before = kept()
    assert len(before) >= 2
    for block in workspace._FREE.values():
        block[:] = b"\xff" * len(block)  # NaN
    found = call(rows(0))
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))
    del found
    assert kept() == before, "no new block"


def test_a_block_serves_again_once_nobody_holds_it() -> None:
    like = torch.empty(0)
    first, second = (large_empty(like, 4, 1024) for _ in range(2))
    assert first.shape == (4, 1024) and first.dtype == torch.float32 and kept() == {}
    address, view = first.data_ptr(), first[1:, ::2]
    del first
    assert kept() == {}, "a view holds it"
    del view
    assert list(kept()) == [address]
    half = large_empty(like, 2048, dtype=torch.bfloat16)
    assert half.data_ptr() == address != second.data_ptr() and half.dtype == torch.bfloat16, "a larger one serves"
    assert kept() == {}


def test_a_heads_gradient_serves_again_when_it_is_set_to_none() -> None:
    x, found = rows(0), []
    head = x["student"].clone().requires_grad_()
    for _ in range(3):
        fused_linear_divergence(x["s"], head, [(1.0, x["t"], x["teacher"])]).loss.backward()
        found.append((head.grad.data_ptr(), head.grad.clone()))
        assert head.grad.data_ptr() not in kept()
        torch.optim.SGD([head], lr=0.0).zero_grad()
    assert all(torch.equal(gradient, found[0][1]) for _, gradient in found)
    assert len({address for address, _ in found}) < 3, "of three blocks in turn one is the head's again"


def test_what_is_accumulated_and_stored_is_its_owners_alone(tmp_path: Path) -> None:
    x = rows(0)
    head = x["student"].clone().requires_grad_()
    for _ in range(2):
        fused_linear_divergence(x["s"], head, [(1.0, x["t"], x["teacher"])]).loss.backward()
    single = torch.autograd.grad(fused_linear_divergence(x["s"], head, [(1.0, x["t"], x["teacher"])]).loss, head)[0]
    torch.testing.assert_close(head.grad, 2 * single)
    torch.save(head.grad, tmp_path / "gradient.pt")
    copies = [torch.load(tmp_path / "gradient.pt"), pickle.loads(pickle.dumps(head.grad)), copy.deepcopy(head.grad)]
    expected = head.grad.clone()
    head.grad = None
    jsd(rows(1))
    assert all(torch.equal(x, expected) for x in copies)


def test_an_error_in_a_call_leaves_nothing_that_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = vgs(rows(0))
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("vgs_kernels.steering.VGSLoss.settle", interrupted)
        vgs(rows(1))
    assert all(torch.equal(x, y) for x, y in zip(vgs(rows(0)), expected, strict=True))


def test_no_more_is_kept_than_there_is_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_KEPT_BYTES", 25 << 12)
    sizes = [x << 12 for x in (3, 10, 5, 12)]
    tensors = {size: large_empty(torch.empty(0, dtype=torch.uint8), size) for size in sizes}
    addresses = {size: x.data_ptr() for size, x in tensors.items()}
    tensors.clear()
    assert kept() == {addresses[size]: size for size in (10 << 12, 12 << 12)}, "the smallest go first"
    assert release_workspace() == 22 << 12 and release_workspace() == 0


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


def test_too_much_is_pytorchs_own_error() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        large_empty(torch.empty(0), 1 << 50)


def test_devices_with_an_allocator_of_their_own_keep_theirs() -> None:
    assert large_empty(torch.empty(0, device="meta"), 1 << 20).device.type == "meta"
    assert kept() == {}
