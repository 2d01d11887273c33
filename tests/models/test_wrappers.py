"""Wrappers of training engines: found, used and left as they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from vgs.models.wrappers import gathered, run_inside, unwrap


class Engine(nn.Module):
    """Holds a model as DDP and DeepSpeed do; rounds what it returns, as FSDP2 does in mixed precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.inside = module, False

    def forward(self, *arguments: object) -> Tensor | None:
        self.inside = True
        result = self.module(*arguments)
        self.inside = False
        return None if result is None else result.bfloat16()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0009765625]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def test_unwrap_goes_through_every_wrapper() -> None:
    model = Model()
    assert unwrap(model) is model
    assert unwrap(torch.compile(Engine(Engine(model)), backend="eager")) is model


def test_a_task_runs_inside_and_keeps_its_value() -> None:
    engine = Engine(model := Model())

    def task() -> tuple[Tensor, list[bool]]:
        assert engine.inside and "forward" not in vars(model)
        return model(torch.ones(1)).sum(), [engine.inside]

    loss, rest = run_inside(engine, task)
    assert rest == [True]
    assert loss.item() == model.weight.item() != loss.bfloat16().item(), "not rounded on the way"
    loss.backward()
    assert model.weight.grad.item() == 1.0
    assert "forward" not in vars(model)


def test_a_task_without_a_loss() -> None:
    assert run_inside(Engine(Model()), lambda: (None, "rest")) == (None, "rest")


@pytest.mark.parametrize("own", [False, True], ids=["class", "instance"])
def test_the_forward_is_back_after_a_failure(own: bool) -> None:
    engine = Engine(model := Model())
    if own:
        model.forward = replaced = lambda x: x

    def task() -> tuple[None, None]:
        raise RuntimeError("in the task")

    with pytest.raises(RuntimeError, match="in the task"):
        run_inside(engine, task)
    assert model.forward is replaced if own else "forward" not in vars(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decorated_forward_lends_its_autocast(dtype: torch.dtype) -> None:
    model = Model()
    model.forward = torch.no_grad()(torch.autocast("cpu", dtype)(model.forward))
    assert run_inside(model, lambda: (None, torch.get_autocast_dtype("cpu")))[1] == dtype
    assert run_inside(model, lambda: (None, torch.is_autocast_enabled("cpu")))[1]
    assert not torch.is_autocast_enabled("cpu")


def test_parameters_of_zero3_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[nn.Parameter]] = []

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        calls.append(parameters)
        yield

    status = SimpleNamespace(AVAILABLE="whole")
    for name, content in {
        "deepspeed": {"zero": SimpleNamespace(GatheredParameters=gather)},
        "deepspeed.runtime": {},
        "deepspeed.runtime.zero": {},
        "deepspeed.runtime.zero.partition_parameters": {"ZeroParamStatus": status},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    plain, cut, whole = (nn.Parameter(torch.ones(1)) for _ in range(3))
    cut.ds_status, whole.ds_status = "cut", "whole"
    with gathered([plain, whole]):
        assert calls == []
    with gathered([plain, cut, whole, cut]):
        assert len(calls) == 1 and len(calls[0]) == 1 and calls[0][0] is cut
