"""What identifies a teacher, a processor and a prompt: hashes of bytes, not of names.

All are SHA-256 in hexadecimal. Two models with the same fingerprint have the same weights in the same type.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..data.check_prompts import check_prompts
from ..models.groups import PromptGroup
from ..models.heads import Head
from ..models.tokenizers import tokenizer_of


def tensor_bytes(value: Tensor) -> memoryview:
    """A tensor's elements as they lie in memory, without a copy where it is on the CPU."""
    return memoryview(value.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of named tensors: names, types, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(tensor_bytes(value))
    return digest.hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of all parameters and buffers of an unwrapped model that is whole (some seconds for 16 GB)."""
    return hash_tensors(sorted(model.state_dict().items()))


def head_fingerprint(head: Head) -> str:
    """A hash of an output head: weight, bias, scale and soft-cap."""
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    return hash_tensors([*tensors.items(), (f"{head.logit_scale} {head.softcap}", torch.zeros(0))])


def prompt_fingerprint(group: PromptGroup) -> bytes:
    """32 bytes that identify a prompt in both views: its token ids, and its image fields bit by bit."""
    fields = {"prompt": group.prompt_ids, "text": group.text_prompt_ids, **group.images}
    return bytes.fromhex(hash_tensors(sorted(fields.items())))


def rendering_fingerprint(processor: Any, forbidden: Sequence[int], **template_options: Any) -> str:
    """A hash of what a processor makes of fixed texts and pictures, and of its vocabulary.

    Args:
        processor: the student's, or a text-only model's tokenizer.
        forbidden, template_options: as of ``vgs.data.prompts.encode_groups``.
    """
    digest = hashlib.sha256(vocabulary_fingerprint(tokenizer_of(processor).get_vocab()).encode())
    for group in check_prompts(processor, forbidden, **template_options):
        digest.update(prompt_fingerprint(group))
    return digest.hexdigest()


def autocast_name(settings: Any) -> str:
    """The type of a run's mixed precision, ``"none"`` without.

    Args:
        settings: a trainer's, with ``bf16`` and ``fp16``.
    """
    return "bfloat16" if settings.bf16 else "float16" if settings.fp16 else "none"


def computing_versions() -> dict[str, str]:
    """Versions of the libraries that hidden states depend on."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def vocabulary_fingerprint(vocabulary: Mapping[str, int]) -> str:
    """A hash of a vocabulary: token -> id."""
    return hashlib.sha256(json.dumps(sorted(vocabulary.items()), ensure_ascii=False).encode()).hexdigest()
