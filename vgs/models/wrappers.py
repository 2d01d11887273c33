"""Models inside the wrappers of training engines: DDP, FSDP, DeepSpeed, accelerate's mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

#: Under these names a wrapper holds the model: DDP and DeepSpeed; FSDP1; torch.compile.
HELD = ("module", "_fsdp_wrapped_module", "_orig_mod")


def unwrap(model: nn.Module) -> nn.Module:
    """The model that its wrappers hold, however many; a model without wrappers (FSDP2 is none) is returned as it is.

    Args:
        model: as a training loop holds it.
    """
    while held := [part for name in HELD if (part := model._modules.get(name)) is not None]:
        model = held[0]
    return model


def to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device; weights in 8 bits stay where bitsandbytes has put them, for not every version moves them.

    Args:
        model: of transformers, unwrapped.
        device: where to.
    """
    return model if getattr(model, "is_loaded_in_8bit", False) else model.to(device)


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are gathered layer by layer (FSDP2, ZeRO-3), so that every rank must run the same forwards.

    Args:
        model: an unwrapped model.
    """
    return any(isinstance(x, DTensor) or hasattr(x, "ds_status") for x in model.parameters())


def run_inside(wrapper: nn.Module, task: Callable[[], tuple[Tensor | None, Any]]) -> tuple[Tensor | None, Any]:
    """Run a task inside the forward of a wrapped model, in place of the model's own forward.

    An engine does its work around that forward: DDP arms its averaging of gradients, FSDP and ZeRO-3 gather parameters.
    A task that calls parts of the unwrapped model elsewhere trains every replica on its own, without a word. Where
    accelerate has put the forward into autocast, the task runs in the same autocast.

    Args:
        wrapper: the model as prepared for training, or a bare one.
        task: returns a loss that needs gradient (or None) and anything else.

    Returns:
        What the task returns. The loss has the graph through the wrapper, and the value that the task gave it: in mixed
        precision FSDP2 rounds every tensor that passes it.
    """
    while (compiled := wrapper._modules.get("_orig_mod")) is not None:  # its forward does not run
        wrapper = compiled
    model, results = unwrap(wrapper), []
    before = vars(model).get("forward")
    context = nullcontext() if before is None else _autocast_around(before)

    def put_back() -> None:
        if before is not None:
            model.forward = before
        else:
            vars(model).pop("forward", None)

    def forward(run: Callable[[], tuple[Tensor | None, Any]]) -> Tensor | None:
        put_back()  # the task may call the model
        with context:
            results.append(run())
        return results[0][0]

    model.forward = forward
    try:
        passed = wrapper(task)
    finally:
        put_back()
    loss, rest = results[0]
    if loss is None:
        return None, rest
    return passed + (loss.detach() - passed.detach()), rest


def _autocast_around(forward: Callable[..., Any]) -> AbstractContextManager[Any]:
    """The autocast that decorates a function, at any depth; else a context that does nothing."""
    function: Any = forward
    while function is not None:
        for cell in getattr(function, "__closure__", None) or ():
            if isinstance(cell.cell_contents, torch.autocast):
                return cell.cell_contents
        function = getattr(function, "__wrapped__", None)
    return nullcontext()


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[Any]:
    """Parameters that ZeRO-3 has cut are whole inside; of other engines, nothing happens.

    Whoever reads a parameter without calling its module needs this, inside the engine's forward (``run_inside``).
    Parameters that are whole already, as tied ones can be, are left alone.
    """
    cut = {id(parameter): parameter for parameter in parameters if hasattr(parameter, "ds_status")}
    if not cut:
        return nullcontext()
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    absent = [parameter for parameter in cut.values() if parameter.ds_status != ZeroParamStatus.AVAILABLE]
    return deepspeed.zero.GatheredParameters(absent) if absent else nullcontext()
