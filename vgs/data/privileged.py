"""What only the teacher sees: the privileged view of a sample, from columns of the data.

``privileged_images``: images (crops, renderings, intermediate pictures), after the sample's own or in their place.
``privileged_text``: a note at the end of the last user message. ``privileged_prompt``: chat messages that replace the
prompt. A sample may have any of them; the student sees ``prompt`` and ``images`` alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from ..models.groups import PromptGroup
from .degraded import control_images
from .messages import shared_format
from .prompts import encode_groups

COLUMNS = ("privileged_images", "privileged_text", "privileged_prompt")
MODES = ("add", "replace")
CONTROLS = ("noise",)


def check_columns(dataset: Any, name: str, needs: str, control: str | None = None) -> None:
    """Stop before training where the data has no privileged context.

    Args:
        dataset: samples; those of a stream without named columns cannot be looked at.
        name: of the dataset, for the message.
        needs: what needs the context, for the message.
        control: see ``privileged_sample``.

    Raises:
        ConfigError: none of ``COLUMNS`` is there, or no ``privileged_images`` for a control that replaces them.
    """
    columns = getattr(dataset, "column_names", None)
    if columns is None and hasattr(dataset, "__getitem__"):
        columns = list(dataset[0])
    if columns is None:
        return
    if not set(COLUMNS) & set(columns):
        raise ConfigError(
            f"{needs} needs privileged context in {name}: at least one of the columns {', '.join(COLUMNS)}; its "
            f"columns are {', '.join(columns)}."
        )
    if control is not None and "privileged_images" not in columns:
        raise ConfigError(
            f"privileged_control={control!r} needs the column privileged_images in {name}; its columns are "
            f"{', '.join(columns)}."
        )


def privileged_sample(sample: Mapping[str, Any], mode: str = "add", control: str | None = None) -> dict[str, Any]:
    """The sample as the teacher sees it: ``prompt`` and ``images``.

    Args:
        sample: ``prompt``, ``images`` and some of ``COLUMNS`` (missing or None: nothing is added).
        mode: ``"add"`` puts the privileged images after the sample's own, ``"replace"`` in their place.
        control: ``"noise"`` shows Gaussian noise of the same sizes instead of the privileged images, the same noise
            whenever a sample comes.

    Raises:
        ConfigError: a note, but no user message to take it.
    """
    sample = shared_format(sample)
    prompt = sample.get("privileged_prompt") or sample["prompt"]
    if note := sample.get("privileged_text"):
        prompt = _with_note(prompt, note)
    extra = list(sample.get("privileged_images") or [])
    if control is not None and extra:
        extra = control_images(extra, control, _seed(extra))
    own = [] if mode == "replace" and extra else sample["images"]
    return {"prompt": _with_places(prompt, len(own), len(extra)), "images": own + extra}


def _with_places(prompt: Sequence[Mapping[str, Any]], own: int, extra: int) -> list[dict[str, Any]]:
    """The prompt with places for the privileged images, where its own have places within the text.

    They stand after the last of its own, or, where those are replaced, where the first of them stood.
    """
    messages = [dict(message) for message in prompt]
    contents = [x["content"] if not isinstance(x.get("content"), str) else [] for x in messages]
    places = [
        (i, j) for i, parts in enumerate(contents) for j, part in enumerate(parts or []) if part["type"] == "image"
    ]
    if not places or not extra:
        return messages
    index, place = places[-1] if own else places[0]
    added = [{"type": "image"}] * extra
    for i, parts in enumerate(contents):
        if isinstance(messages[i].get("content"), str) or not parts:
            continue
        kept: list[dict[str, Any]] = []
        for j, part in enumerate(parts):
            if own or part["type"] != "image":
                kept.append(part)
            if (i, j) == (index, place):
                kept += added
        messages[i]["content"] = kept
    return messages


def _seed(images: Sequence[Image.Image]) -> int:
    """A number that belongs to the images, so that neither order nor resumption of a run changes their noise."""
    value = 0
    for image in images:
        value = zlib.crc32(np.asarray(image.convert("RGB")).tobytes(), value)
    return value


def _with_note(prompt: Sequence[Mapping[str, Any]], note: str) -> list[dict[str, Any]]:
    messages = [dict(message) for message in prompt]
    for message in reversed(messages):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                message["content"] = f"{content}\n{note}"
            else:
                message["content"] = [*content, {"type": "text", "text": f"\n{note}"}]
            return messages
    raise ConfigError("privileged_text needs a user message to be added to, but the prompt has none.")


def privileged_groups(
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    groups: Sequence[PromptGroup],
    forbidden: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    mode: str = "add",
    control: str | None = None,
    **template_options: Any,
) -> list[PromptGroup]:
    """The privileged view of prompts: other prompts and images, the same responses in the same order.

    Args:
        processor, forbidden, device, template_options: see ``prompts.encode_groups``.
        samples: one for each group.
        groups: prompts with their responses, as the student sees them.
        mode, control: see ``privileged_sample``.

    Raises:
        ValueError: as ``encode_groups``.
    """
    seen = [privileged_sample(sample, mode, control) for sample in samples]
    encoded = encode_groups(processor, seen, [()] * len(seen), forbidden, device, **template_options)
    return [replace(view, responses=group.responses) for view, group in zip(encoded, groups, strict=True)]
