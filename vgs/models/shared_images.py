"""Images that several rows of a padded batch share, through the vision tower once.

A body merges the outputs of its own ``get_image_features`` into its rows, one after the other. In padded rows these
outputs are computed for each prompt once and repeated, so that gradients through the tower add up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .families import backbone, placeholder_ids
from .image_fields import is_pixels

#: What a tower returns beside the features that are merged.
UNMERGED = frozenset({"hidden_states", "attentions"})


@dataclass(frozen=True)
class SharedImages:
    """Prompts with images, and the number of rows that each stands in.

    Attributes:
        prompts: tensors [P] int64, in the order of the rows.
        repeats: rows of each prompt, one behind the other.
        fields: the image fields of the prompts, each prompt's once, on the device of the rows.
    """

    prompts: tuple[Tensor, ...]
    repeats: tuple[int, ...]
    fields: dict[str, Tensor]


def shares_images(model: nn.Module) -> bool:
    """Whether the body of an unwrapped (possibly PEFT) model merges what its ``get_image_features`` returns."""
    body = backbone(model)
    forward = inspect.unwrap(type(body).forward)
    return hasattr(body, "get_image_features") and "get_image_features" in forward.__code__.co_names


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, this instance has another method of this name."""
    before = vars(module).get(name)
    setattr(module, name, function)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


@contextmanager
def images_once(body: nn.Module, shared: SharedImages) -> Iterator[None]:
    """Inside, the body's forward takes pixels of each prompt once, and the other image fields of every row.

    The tower runs once for all of them together, as often as on any other rank.

    Args:
        body: with ``get_image_features``.
        shared: whose images they are.

    Raises:
        ValueError: the features are not one for each placeholder of the prompts, or were not asked for.
    """
    original, called = body.get_image_features, []
    names = list(inspect.signature(original).parameters)
    own = {name: value for name, value in shared.fields.items() if not is_pixels(name)}

    def repeated(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        args = [own.get(name, value) for name, value in zip(names, args, strict=False)]
        return repeat_features(
            original(*args, **{**kwargs, **{x: own[x] for x in kwargs.keys() & own.keys()}}), shared, body
        )

    with replaced(body, "get_image_features", repeated):
        yield
    if not called:
        raise ValueError(f"{type(body).__name__} has get_image_features, but its forward does not call it.")


def repeat_features(output: Any, shared: SharedImages, body: nn.Module) -> Any:
    """What ``get_image_features`` returned, with the features of each prompt once for every row of it.

    Args:
        output: in any form; an output class is changed in place.
        shared: whose images they are; ``fields`` are not read.
        body: whose method it was.

    Raises:
        ValueError: the features are not one for each placeholder of the prompts.
    """
    parts = dict(output) if isinstance(output, Mapping) else {"pooler_output": output}
    if (pooled := getattr(output, "pooler_output", None)) is not None:  # in older releases an attribute alone
        parts["pooler_output"] = pooled
    skipped = UNMERGED if parts.get("pooler_output") is None else UNMERGED | {"last_hidden_state"}
    merged = {name: value for name, value in parts.items() if name not in skipped}
    counts = _tokens(shared, placeholder_ids(body.config), set().union(*map(_lengths, merged.values())))
    if counts is None:
        raise ValueError(
            f"{type(body).__name__}.get_image_features does not return one feature for each image placeholder: its "
            "images cannot be shared by rows."
        )
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    rows = [
        torch.arange(start, start + count).repeat(times)
        for start, count, times in zip(starts, counts, shared.repeats, strict=False)
    ]
    index, total = torch.cat(rows), starts[-1]
    merged = {name: _select(value, total, index) for name, value in merged.items()}
    if not isinstance(output, Mapping):
        return merged["pooler_output"]
    for name, value in merged.items():
        output[name] = value
    return output


def _tokens(shared: SharedImages, placeholders: Sequence[int], lengths: set[int]) -> list[int] | None:
    """How many features each prompt has: as often as it has one of the placeholders (the commonest first), or all."""
    ids = torch.tensor(placeholders)
    found = [[int(torch.isin(prompt, chosen).sum()) for prompt in shared.prompts] for chosen in (*ids[:, None], ids)]
    ordered = [*sorted(found[:-1], key=sum, reverse=True), found[-1]]
    return next((counts for counts in ordered if sum(counts) in lengths), None)


def _features(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1


def _length(value: Tensor) -> int:
    return value.shape[:-1].numel()


def _lengths(value: Any) -> set[int]:
    """The numbers of features in a tensor [..., D], in a list of such tensors together, and in lists of lists."""
    if _features(value):
        return {_length(value)}
    if not isinstance(value, (list, tuple)):
        return set()
    together = {sum(map(_length, value))} if value and all(map(_features, value)) else set()
    return together.union(*map(_lengths, value))


def _select(value: Any, total: int, index: Tensor) -> Any:
    """Chosen rows of everything that has ``total`` of them, in the form that it came in."""
    if _features(value):
        if _length(value) != total:
            return value
        chosen = value.flatten(0, -2).index_select(0, index.to(value.device))
        if value.ndim == 2 or value.shape[0] == 1:
            return chosen if value.ndim == 2 else chosen.reshape(1, -1, value.shape[-1])
        return chosen.unflatten(0, (-1, *value.shape[1:-1]))  # prompts have whole images
    if not isinstance(value, (list, tuple)):
        return value
    if all(map(_features, value)) and sum(map(_length, value)) == total:
        return type(value)([_select(torch.cat([x.flatten(0, -2) for x in value]), total, index)])
    return type(value)([_select(x, total, index) for x in value])
