"""Trained models on the disk: each is trained once, under a name that tells everything its weights depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from transformers import PreTrainedModel, Qwen3VLForConditionalGeneration

#: Raise it whenever other weights would come of the same recipe: other pictures, questions, answers, tokens, models or
#: steps of training. ``tests/digits/test_cache.py`` fails until that is done.
TASK_VERSION = 1


def key(recipe: Any, seed: int) -> str:
    """Sixteen hexadecimal digits that stand for a trained model.

    Args:
        recipe: a dataclass of everything that was chosen for the training.
        seed: of the initial weights and the order of the data.
    """
    versions = [TASK_VERSION, torch.__version__, transformers.__version__, numpy.__version__, torch.get_num_threads()]
    settings = json.dumps([dataclasses.asdict(recipe), seed, versions], sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def trained_once(cache: Path | str, name: str, train: Callable[[], PreTrainedModel]) -> Qwen3VLForConditionalGeneration:
    """A model from the cache, or trained now and put there.

    Processes that train the same model at once do not clash: each writes a folder of its own, and the first one renames
    it to the model's.

    Args:
        cache: folder of all trained models; made if missing.
        name: of this model's folder, with its ``key``.
        train: trains it.

    Returns:
        The model in evaluation mode, always read from the disk: fresh or not, it is the same to the last bit.
    """
    folder = Path(cache).expanduser() / name
    if not folder.exists():
        model = train()
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}-")
        model.save_pretrained(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process finished the same model first
            shutil.rmtree(unfinished)
    return Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
