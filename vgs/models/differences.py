"""Where two runs of one model over the same sequence begin to differ: the name of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attention import active_layout
from .families import backbone


@dataclass
class Trace:
    """What the modules of a model took and gave in one run.

    Attributes:
        calls: (name, number of the call) -> input and output, in the order in which the modules finished. The input is
            None where it is no tensor.
        shape: rows and columns of the batch. row: where the sequence stands. places: [L] its columns.
    """

    calls: dict[tuple[str, int], tuple[Tensor | None, Tensor]] = field(default_factory=dict)
    shape: tuple[int, int] = (0, 0)
    row: int = 0
    places: Tensor | None = None

    def rows(self, value: Tensor | None) -> Tensor | None:
        """[L, ...] of the sequence, of a tensor over all tokens; None for tensors of other things."""
        if value is None or self.places is None or value.ndim < 2:
            return None
        if value.shape[0] == self.shape[0] * self.shape[1]:  # the experts of a layer take all tokens as one list
            value = value.unflatten(0, self.shape)
        if value.shape[:2] == (1, self.shape[1]):  # what is the same for all rows
            return value[0, self.places.to(value.device)]
        return value[self.row, self.places.to(value.device)] if value.shape[:2] == self.shape else None


def _tensor(value: Any) -> Tensor | None:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    value = getattr(value, "last_hidden_state", value)
    return value.detach() if isinstance(value, Tensor) and value.is_floating_point() else None


@contextmanager
def traced(model: nn.Module, prompt: int, branch: int, row: int) -> Iterator[Trace]:
    """Record what runs inside.

    Args:
        model: unwrapped; its modules are watched, and at its body's first call, where the sequence stands.
        prompt, branch: numbers of the sequence's prompt and response in a packed row.
        row: of the sequence in any other batch.
    """
    trace, counts = Trace(), {}

    def find(module: nn.Module, given: tuple, named: dict[str, Any]) -> None:
        if trace.places is not None:
            return
        layout, mask = active_layout(), named["attention_mask"]
        trace.shape = tuple(mask.shape)
        if layout is None:
            trace.row, found = row, mask[row] > 0
        else:
            found = (layout.prompt == prompt) & ((layout.branch == 0) | (layout.branch == branch))
        trace.places = found.nonzero().flatten()

    def watch(name: str) -> Callable[..., None]:
        def record(module: nn.Module, given: tuple, named: dict[str, Any], output: Any) -> None:
            number = counts[name] = counts.get(name, -1) + 1
            taken = _tensor(given[0] if given else named.get("hidden_states"))
            if (value := _tensor(output)) is not None:
                trace.calls[name, number] = (taken, value)

        return record

    handles = [backbone(model).register_forward_pre_hook(find, with_kwargs=True)]
    handles += [
        module.register_forward_hook(watch(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def relative_gap(value: Tensor, expected: Tensor, scale: Tensor) -> float:
    """The largest difference of two tensors of one shape, relative to ``scale`` (0-d); infinite for NaN."""
    gap = (value - expected).abs().max() if value.numel() else value.new_zeros(())
    return (gap / scale.clamp(min=1e-30)).nan_to_num(nan=torch.inf).item()


def _gap(first: Tensor, second: Tensor) -> float:
    """The largest difference relative to the largest entry, over the tokens that both have."""
    length = min(len(first), len(second))
    first, second = first[:length].float(), second[:length].float()
    if first.shape != second.shape:
        return 0.0
    return relative_gap(second, first, first.abs().max().clamp(min=1e-12))


def first_difference(model: nn.Module, plain: Trace, other: Trace, tolerance: float) -> str | None:
    """The first module that takes the same in both runs and gives something else, with its class.

    Args:
        model: of both runs.
        plain: of the sequence alone.
        other: of a run that holds the sequence among others.
        tolerance: a larger difference counts, relative to the largest entry.

    Returns:
        Such as ``"language_model.layers.0.linear_attn (Qwen3_5GatedDeltaNet)"``; None if no module's tokens could be
        compared or none differ.
    """
    for key, (taken, given) in other.calls.items():
        if key not in plain.calls:
            continue
        before, after = (plain.rows(x) for x in plain.calls[key])
        taken, given = other.rows(taken), other.rows(given)
        if after is None or given is None or _gap(after, given) <= tolerance:
            continue
        if before is None or taken is None or _gap(before, taken) <= tolerance:
            return f"{key[0]} ({type(model.get_submodule(key[0])).__name__})"
    return None
