"""Packed rows through the kernels that exist on a GPU alone, against the padded one and against float32."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model, tiny_processor, tiny_samples
from torch import nn

from vgs.data.prompts import encode_groups
from vgs.models.families import placeholder_ids
from vgs.models.forward import score_groups
from vgs.teachers.local import Offload

pytestmark = pytest.mark.gpu

RESPONSES = [[[20, 1], [20] * 70], [[21, 22, 23, 1] * 30], [[24]], [[25, 26, 1], [22] * 40, [22, 23]]]


def scored(model: nn.Module, kernel: str, share: bool, gradient: bool = True) -> list[torch.Tensor]:
    """Rows of both views, and the gradient of a functional of them by the first layer's weight."""
    groups = encode_groups(tiny_processor(), tiny_samples(4), RESPONSES, placeholder_ids(model.config), "cuda")
    rows = score_groups(model, groups, share_prefix=share, kernel=kernel)
    if not gradient:
        return [x.float() for x in rows]
    weight = model.model.language_model.layers[0].mlp.up_proj.weight
    loss = sum((x.float() * torch.linspace(-1, 1, x.shape[1], device="cuda")).sum() for x in rows)
    return [*[x.detach().float() for x in rows], *torch.autograd.grad(loss, [weight])]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("share", [True, False])
def test_flex_in_float32(share: bool) -> None:
    model = tiny_model(0).cuda()
    for actual, expected in zip(scored(model, "flex", share), scored(model, "dense", share), strict=True):
        assert error(actual, expected) < 1e-4


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("kernel", "share"), [("flex", True), ("flex", False), ("varlen", False), ("auto", True)])
def test_kernels_in_bfloat16(kernel: str, share: bool, autocast: bool) -> None:
    """No further from float32 than twice the padded kernel in the same precision."""
    exact = scored(tiny_model(0).cuda(), "dense", share)
    model = tiny_model(0).cuda()
    model = model if autocast else model.to(torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        padded, found = (scored(model, name, share) for name in ("dense", kernel))
    for actual, reference, expected in zip(found, padded, exact, strict=True):
        assert error(actual, expected) <= 2 * error(reference, expected) + 1e-3


def test_an_offloaded_model_comes_and_goes() -> None:
    model = tiny_model(0).cuda()
    with torch.no_grad():
        expected = scored(model, "dense", True, gradient=False)
        before = torch.cuda.memory_allocated()
        head = model.lm_head.weight
        offload = Offload(model, [head], head.device)
        left = torch.cuda.memory_allocated()
        total = sum(p.nbytes for p in model.parameters())
        assert before - left > 0.9 * (total - head.nbytes)
        with offload.on_device():
            found = scored(model, "dense", True, gradient=False)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        assert next(iter(model.model.language_model.layers[0].parameters())).device.type == "cpu"
        assert head.device.type == "cuda"
