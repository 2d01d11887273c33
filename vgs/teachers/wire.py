"""Prompts, hidden states and heads as bytes, in the safetensors format: no pickle, nothing that could run.

Images go as the fields that the student's processor made of them, bit by bit. A picture file would be a tenth of the
size, but a server would have to prepare it anew, and another version of a library resizes otherwise: then teacher and
student would see different pixels, and nobody would know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..models.groups import PromptGroup, placed
from ..models.heads import Head
from ..models.image_fields import MULTIMODAL_FIELDS


class Malformed(ValueError):
    """Bytes that are not what was expected; the message is one sentence."""


def pack(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> bytes:
    """Named tensors of any shape and type, and notes (plain JSON), as bytes."""
    whole = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    return save(whole, {"notes": json.dumps(notes)})


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``pack`` was given, on the CPU.

    Raises:
        Malformed: other bytes.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        notes = json.loads(header.get("__metadata__", {}).get("notes", "{}"))
        return load(data), notes
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Malformed(f"expected safetensors, got bytes that are none ({type(error).__name__}).") from error


def pack_groups(groups: Sequence[PromptGroup], **notes: Any) -> bytes:
    """Prompts with their responses, as bytes.

    Args:
        groups: their tensors may be on any device.
        **notes: plain JSON that goes along.
    """
    tensors = {}
    for number, group in enumerate(groups):
        tensors[f"{number}.prompt"] = group.prompt_ids
        tensors[f"{number}.text"] = group.text_prompt_ids
        tensors[f"{number}.responses"] = torch.cat(group.responses) if group.responses else group.prompt_ids[:0]
        tensors[f"{number}.lengths"] = torch.tensor(group.response_lengths, dtype=torch.int64)
        tensors |= {f"{number}.images.{name}": value for name, value in group.images.items()}
    return pack(tensors, {"groups": len(groups), **notes})


def _ids(tensors: Mapping[str, Tensor], name: str, limit: int) -> Tensor:
    value = tensors.get(name)
    if value is None or value.dtype != torch.int64 or value.ndim != 1:
        raise Malformed(f"{name} must be [T] int64, got {None if value is None else (value.dtype, value.shape)}.")
    if len(value) and not 0 <= int(value.min()) <= int(value.max()) < limit:
        raise Malformed(
            f"{name} must hold numbers from 0 to {limit - 1}, got {int(value.min())} to {int(value.max())}."
        )
    return value


def unpack_groups(data: bytes, vocabulary: int, device: torch.device) -> tuple[list[PromptGroup], dict[str, Any]]:
    """Prompts with their responses, and the notes that came along.

    Args:
        data: of ``pack_groups``.
        vocabulary: ids must be below it.
        device: where image fields go.

    Raises:
        Malformed: other bytes, other types or shapes, ids outside the vocabulary, or an unknown field.
    """
    tensors, notes = unpack(data)
    count = notes.get("groups")
    if type(count) is not int or not 0 <= count <= len(tensors):
        raise Malformed(f"notes must say how many groups there are, got {count!r}.")
    groups = []
    for number in range(count):
        prompt, text, answers = (_ids(tensors, f"{number}.{x}", vocabulary) for x in ("prompt", "text", "responses"))
        lengths = _ids(tensors, f"{number}.lengths", len(answers) + 1).tolist()
        if sum(lengths) != len(answers):
            raise Malformed(f"{number}.lengths must add up to {len(answers)}, got {sum(lengths)}.")
        start = f"{number}.images."
        fields = {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}
        if unknown := sorted(set(fields) - set(MULTIMODAL_FIELDS)):
            raise Malformed(f"{start}{unknown[0]} is no image field; expected some of {', '.join(MULTIMODAL_FIELDS)}.")
        groups.append(PromptGroup(prompt, text, answers.split(lengths), placed(fields, device)))
    return groups, notes


def pack_head(head: Head) -> bytes:
    """An output head as bytes."""
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    return pack(tensors, {"logit_scale": head.logit_scale, "softcap": head.softcap})


def unpack_head(data: bytes) -> Head:
    """The head of ``pack_head``, on the CPU.

    Raises:
        Malformed: other bytes.
    """
    tensors, notes = unpack(data)
    if "weight" not in tensors or "logit_scale" not in notes:
        raise Malformed("expected an output head, got other tensors.")
    return Head(tensors["weight"], tensors.get("bias"), notes["logit_scale"], notes.get("softcap"))
