"""The states that enter a model's output head, and the fallback that has them from padded batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .adapters import is_peft_model
from .families import backbone
from .groups import PromptGroup
from .heads import output_layer
from .padding import PaddedViews, pad_groups
from .shared_images import images_once, shares_images

#: Whether what a model's body returns last enters its head unchanged, as the forward of its class has shown.
_UNCHANGED: WeakKeyDictionary[nn.Module, tuple[type, bool]] = WeakKeyDictionary()


def final_states(model: nn.Module, **inputs: Any) -> Tensor:
    """[B, L, D] hidden states that enter the output head, of an unwrapped (possibly PEFT) model.

    The body returns them, in most families. Some scale them before the head (MiniCPM3), some bodies hold the head
    themselves (Llama 4): there they are taken where they enter it. Which of the two a model is, its own forward shows
    the first time. Logits are never formed.

    Args:
        model: with an output head.
        **inputs: of the body's forward.

    Raises:
        ValueError: the model's forward does not call its head.
    """
    body, (kind, unchanged) = backbone(model), _UNCHANGED.get(model, (None, False))
    if kind is type(model):
        if unchanged:
            return body(**inputs, use_cache=False).last_hidden_state
        return _entering_states(model, **inputs)
    returned: list[Any] = []
    handle = body.register_forward_hook(lambda _module, _inputs, output: returned.append(output))
    try:
        states = _entering_states(model, **inputs)
    finally:
        handle.remove()
    # The model's own hooks do not run: a body that is the whole model returns nothing here.
    last = getattr(returned[-1], "last_hidden_state", None) if returned else None
    _UNCHANGED[model] = type(model), last is not None and _equal(states, last)
    return states


def _equal(states: Tensor, others: Tensor) -> bool:
    if states.shape != others.shape or states.device != others.device:
        return False
    return torch.allclose(states.detach(), others.detach().to(states.dtype), rtol=0, atol=0, equal_nan=True)


def _entering_states(model: nn.Module, **inputs: Any) -> Tensor:
    """The input of the head in the model's own forward, with a head that makes one column of zeros."""
    owner = model.base_model.model if is_peft_model(model) else model
    head, entered = output_layer(model), []

    def no_logits(states: Tensor, *_: Any, **__: Any) -> Tensor:
        entered.append(states)
        return states.new_zeros((*states.shape[:-1], 1))

    put_back = _replace(head, "forward", no_logits)
    try:
        # That of the class: engines and kernels replace an instance's by one with a loss or a wrapper of their own.
        type(owner).forward(owner, **inputs, use_cache=False)
    except Exception:
        if not entered:  # what follows the head is not wanted, and may miss the other columns
            raise
    finally:
        put_back()
    if not entered:
        raise ValueError(f"{type(owner).__name__}.forward does not call its output head, a {type(head).__name__}.")
    return entered[-1]


def _replace(module: nn.Module, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute of this instance, and return what puts back the one before."""
    before = vars(module).get(name)
    setattr(module, name, value)
    return lambda: delattr(module, name) if before is None else setattr(module, name, before)


def padded_states(model: nn.Module, views: PaddedViews) -> Tensor:
    """[N, D] (or [2N, D], text-only view last) hidden states that predict the response tokens of padded rows.

    Args:
        model: an unwrapped (possibly PEFT) model.
        views: from ``pad_groups``.

    Raises:
        ValueError: shared images of a body that cannot share them.
    """
    inputs = {"input_ids": views.input_ids, "attention_mask": views.attention_mask, **views.images}
    with images_once(backbone(model), views.shared) if views.shared else nullcontext():
        states = final_states(model, **inputs)
    return states[views.scored.to(states.device)]


def score_padded(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    text: bool,
    wanted: Sequence[bool],
    device: torch.device,
    *,
    share_images: bool = True,
) -> tuple[Tensor, ...]:
    """As ``vgs.models.forward.score_groups``, in padded batches.

    Args:
        model, groups, text: see there.
        wanted: for each response whether its text-only rows carry gradient; all do if one does.
        device: where the batches go.
        share_images: whether each prompt's images run once for all its responses, where the model's body allows it.
    """
    share_images = share_images and shares_images(model)

    def run(*views: str) -> Tensor:
        return padded_states(model, pad_groups(groups, views, device, share_images=share_images))

    # Without image grids, a family may batch its pixels by row, where text-only rows do not fit in.
    stackable = all("image_grid_thw" in group.images or not group.has_images for group in groups)
    if text and stackable and all(wanted):
        return run("multimodal", "text").chunk(2)
    rows = run("multimodal")
    if not text:
        return (rows,)
    with torch.set_grad_enabled(any(wanted) and torch.is_grad_enabled()):
        return rows, run("text")
