"""Results of passes over a whole dataset, kept on disk beside the caches of ``datasets``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets.fingerprint import Hasher

from .. import disk
from ..models.tokenizers import tokenizer_of


def processor_fingerprint(processor: Any, **template_options: Any) -> str:
    """A hash of all that decides how a processor counts: its settings, tokenizer, template and its version."""
    tokenizer = tokenizer_of(processor)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {
        "class": f"{type(processor).__module__}.{type(processor).__qualname__}",
        "version": transformers.__version__,
        "template": getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None),
        "options": template_options,
        "plain": {key: value for key, value in vars(processor).items() if isinstance(value, (str, int, float))},
        "images": image.to_dict() if (image := getattr(processor, "image_processor", None)) is not None else None,
        # The words alone: padding and truncation are settings of a call, and change with use.
        "tokenizer": [backend.model.__class__.__name__, backend.get_vocab(with_added_tokens=True)]
        if backend is not None
        else tokenizer.get_vocab(),
    }
    return Hasher.hash(json.dumps(parts, sort_keys=True, default=str))


def remembered(kind: str, key: str, compute: Callable[[], Any]) -> Any:
    """What ``compute`` gives (plain JSON), from disk where it was computed for this key before.

    Args:
        kind: of the result; part of the file's name.
        key: a hash of everything that the result depends on.
    """
    return disk.remembered(Path(datasets.config.HF_DATASETS_CACHE) / "vgs" / f"{kind}-{key}.json", compute)
