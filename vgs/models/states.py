"""The states that enter a model's output head, and the fallback that has them from padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .adapters import without_adapter
from .families import backbone, device_of
from .groups import PER_TOKEN_FIELDS, PromptGroup, response_lengths
from .heads import output_layer
from .padding import PaddedView, pad_groups
from .shared_images import images_once, replaced, shares_images

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
    owner = without_adapter(model)
    head, entered = output_layer(model), []

    def no_logits(states: Tensor, *_: Any, **__: Any) -> Tensor:
        entered.append(states)
        return states.new_zeros((*states.shape[:-1], 1))

    try:
        # That of the class: engines and kernels replace an instance's by one with a loss or a wrapper of their own.
        with replaced(head, "forward", no_logits):
            type(owner).forward(owner, **inputs, use_cache=False)
    except Exception:
        if not entered:  # what follows the head is not wanted, and may miss the other columns
            raise
    if not entered:
        raise ValueError(f"{type(owner).__name__}.forward does not call its output head, a {type(head).__name__}.")
    return entered[-1]


def padded_states(model: nn.Module, view: PaddedView) -> Tensor:
    """[N, D] hidden states that predict the response tokens of padded rows.

    Args:
        model: an unwrapped (possibly PEFT) model.
        view: from ``pad_groups``.

    Raises:
        ValueError: shared images of a body that cannot share them.
    """
    inputs = {"input_ids": view.input_ids, "attention_mask": view.attention_mask, **view.images}
    with images_once(backbone(model), view.shared) if view.shared else nullcontext():
        states = final_states(model, **inputs)
    return states[view.scored.to(states.device)]


def score_padded(
    model: nn.Module,
    groups: Sequence[PromptGroup],
    text: bool,
    wanted: Sequence[bool],
    device: torch.device,
    *,
    share_images: bool = True,
) -> tuple[Tensor, ...]:
    """As ``vgs.models.forward.score_groups``, in one padded batch for each view.

    Prompts without their images are much shorter: in one batch with the others they would be padding for the most part.

    Args:
        model, groups, text: see there.
        wanted: for each response whether its text-only rows carry gradient; all do if one does.
        device: where the batches go.
        share_images: whether each prompt's images run once for all its responses, where the model's body allows it.
    """
    shared = share_images and shares_images(model)
    rows = padded_states(model, pad_groups(groups, "multimodal", device, share_images=shared))
    if not text:
        return (rows,)
    with torch.set_grad_enabled(any(wanted) and torch.is_grad_enabled()):
        return rows, padded_states(model, pad_groups(groups, "text", device))


def plain_states(model: nn.Module, groups: Sequence[PromptGroup]) -> tuple[Tensor, Tensor]:
    """Both views by one plain forward for each response: what every other way is compared with.

    Args:
        model: unwrapped, with output embeddings.
        groups: prompts with their responses.

    Returns:
        ([N, D] multimodal, [N, D] text-only); order: group, response, token.
    """
    device, views = device_of(model), []
    for with_image in (True, False):
        rows = []
        for group in groups:
            prompt = group.prompt_ids if with_image else group.text_prompt_ids
            for response in group.responses:
                ids = torch.cat([prompt, response])[None].to(device)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                for name, value in group.images.items():
                    if name in PER_TOKEN_FIELDS:
                        kinds = value[None].to(device) if with_image else torch.zeros_like(prompt)[None].to(device)
                        inputs[name] = pad(kinds, (0, len(response)))
                    elif with_image:
                        inputs[name] = value.to(device)
                rows.append(final_states(model, **inputs)[0, len(prompt) - 1 : -1])
        views.append(torch.cat(rows))
    return views[0], views[1]


@torch.no_grad()
def looks_ahead(model: nn.Module, groups: Sequence[PromptGroup]) -> float:
    """How much plain states of a response change where its last tokens are cut off, relative to the largest state.

    Rounding, unless tokens see others behind them, as in the prefix of PaliGemma: such a model would read the answer.

    Args:
        model: unwrapped, with an output head.
        groups: prompts with at least one response of two tokens or more each.
    """
    whole = [group.select([0]) for group in groups]
    kept = [len(group.responses[0]) // 2 for group in whole]
    cut = [replace(group, responses=(group.responses[0][:count],)) for group, count in zip(whole, kept, strict=True)]
    gap = 0.0
    for rows, others in zip(plain_states(model, whole), plain_states(model, cut), strict=True):
        parts = zip(rows.split(response_lengths(whole)), others.split(kept), strict=True)
        changes = [(x[: len(y)] - y).abs().max() / rows.abs().max() for x, y in parts]
        gap = max(gap, *[change.item() for change in changes])
    return gap
