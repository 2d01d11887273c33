"""How far a way of running a model is from one plain forward for every sequence: states, gradients, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import in_one_line
from .attention import attention_put_back
from .differences import first_difference, relative_gap, traced
from .families import backbone, device_of
from .groups import PromptGroup, response_lengths
from .packed import score_packed
from .states import plain_states, score_padded

#: Largest difference of a state, and of a gradient, from the plain forward's, relative to the largest entry. Rounding
#: makes 1e-6 to 1e-4 in float32; what leaks, or stands at another position, made 0.02 and more. In 16 bits, which are
#: asked where a family's kernels know no float32, rounding makes 0.01 and, of gradients, 0.15; leaks make 0.3 and more.
TOLERANCES = {"float32": (1e-3, 1e-2), "bfloat16": (5e-2, 0.5)}
SMALL = 2**20  # entries of a parameter whose gradient is compared


@dataclass(frozen=True)
class Agreement:
    """How far one way of running a model is from a plain forward per sequence.

    Attributes:
        states, gradients: largest relative differences; None where the way raises an error.
        where: the first module that says something else, in words; or the error.
        dtype: of the copy that was asked, a key of ``TOLERANCES``.
    """

    states: float | None
    gradients: float | None
    where: str | None = None
    dtype: str = "float32"

    @property
    def exact(self) -> bool:
        """Whether both are rounding."""
        if self.states is None or self.gradients is None:
            return False
        states, gradients = TOLERANCES[self.dtype]
        return self.states <= states and self.gradients <= gradients  # False for NaN

    def __str__(self) -> str:
        if self.states is None:
            return self.where or "an error"
        numbers = f"states differ by {self.states:.1e}, gradients by {self.gradients:.1e} of the largest"
        return f"{numbers}; first in {self.where}" if self.where else numbers


def in_words(problem: Exception) -> str:
    """The class of an error and what it says, in one line of bounded length."""
    return f"{type(problem).__name__}: {in_one_line(problem)[:300]}"


def _packed(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, ...]:
    with attention_put_back(backbone(model)):  # padded batches, asked next, run by the model's own
        return score_packed(model, groups, True, [True] * len(response_lengths(groups)), device_of(model))


def _padded(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, ...]:
    return score_padded(model, groups, True, [True] * len(response_lengths(groups)), device_of(model))


def _repeated(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, ...]:
    wanted = [True] * len(response_lengths(groups))
    return score_padded(model, groups, True, wanted, device_of(model), share_images=False)


#: Ways to run a model, the best first: packed rows; padded batches; and these with an image for every response.
WAYS: dict[str, Callable[[nn.Module, Sequence[PromptGroup]], tuple[Tensor, ...]]] = {
    "packed": _packed,
    "padded": _padded,
    "repeated": _repeated,
}


def outcome(
    model: nn.Module, groups: Sequence[PromptGroup], run: Callable[..., tuple[Tensor, ...]]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Both views' states, and the gradients of a random linear functional of them."""
    parameters = {name: p for name, p in model.named_parameters() if p.numel() <= SMALL and p.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        states = run(model, groups)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(x.shape, generator=generator).to(x.device) for x in states]
        value = sum((x.float() * weight).sum() for x, weight in zip(states, weights, strict=True))
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    finally:
        model.requires_grad_(False)
    gradients = {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
    return [x.detach().float() for x in states], gradients


def compare(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    way: str,
    expected: tuple[list[Tensor], dict[str, Tensor]] | None = None,
) -> Agreement:
    """One way of running a model against the plain forward of every sequence.

    Args:
        model: unwrapped, of a dtype in ``TOLERANCES``, in evaluation mode; no parameter requires gradient afterwards.
        groups: prompts with their responses.
        way: of ``WAYS``.
        expected: of the plain forwards, where they have been run.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    states, gradients = outcome(model, groups, plain_states) if expected is None else expected
    try:
        own_states, own_gradients = outcome(model, groups, WAYS[way])
    except Exception as problem:  # whatever a family's code raises
        return Agreement(None, None, in_words(problem), dtype)
    gap = max(relative_gap(x, y, y.abs().max()) for x, y in zip(own_states, states, strict=True))
    largest = max((x.abs().max() for x in gradients.values()), default=torch.tensor(0.0))
    slope = max(
        (
            relative_gap(own_gradients.get(name, torch.zeros_like(x)), x, torch.maximum(x.abs().max(), 1e-3 * largest))
            for name, x in gradients.items()
        ),
        default=0.0,
    )
    found = Agreement(gap, slope, dtype=dtype)
    return found if found.exact else replace(found, where=_where(model, groups, way, TOLERANCES[dtype][0]))


@torch.no_grad()
def _where(model: nn.Module, groups: Sequence[PromptGroup], way: str, tolerance: float) -> str | None:
    """The first module that says something else of a sequence which stands behind others."""
    for target in reversed(groups):
        ordered = [*(group for group in groups if group is not target), target]
        before = len(response_lengths(ordered[:-1]))
        for number in range(len(target.responses)):
            with traced(model, 0, 1, 0) as plain:
                plain_states(model, [target.select([number])])
            with traced(model, len(ordered) - 1, number + 1, before + number) as other:
                WAYS[way](model, ordered)
            if found := first_difference(model, plain, other, tolerance):
                return found
    return None
