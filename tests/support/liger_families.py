"""Which families' Liger patches work beside the installed transformers.

    python tests/support/liger_families.py FOLDER FAMILY ...

Prints a line of JSON for each: {family: what is raised, or how far logits and gradients of the patched model are from
its own}. Each family has a process of its own, since patches stay.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import liger_interpreter  # noqa: F401  first of all
import torch
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES
from real_checkpoints import photo_samples, real_checkpoint
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs.data.prompts import encode_prompts


def step(folder: Path, inputs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """A model from its checkpoint, and its logits and gradients."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    logits = model(**inputs, use_cache=False).logits
    logits.log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return model, {"logits": logits.detach(), **gradients}


def measure(family: str, folder: Path) -> str | dict[str, Any]:
    """What comes of patching a family's classes, as a user does before loading a model."""
    real_checkpoint(family, folder)
    ids, mask, fields = encode_prompts(AutoProcessor.from_pretrained(folder), photo_samples(folder)[:1])
    inputs = {"input_ids": ids, "attention_mask": mask, **fields}
    _, plain = step(folder, inputs)
    try:
        PATCHES[family](fused_linear_cross_entropy=False)  # vgs_step forms no logits
        patched, found = step(folder, inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition(" (/")[0]
    # Of gradients that are zero but for rounding (those of the keys' biases) only the absolute error counts.
    floor = 1e-3 * max(x.abs().max() for x in plain.values())
    errors = [(found[name] - x).abs().max() / torch.maximum(x.abs().max(), floor) for name, x in plain.items()]
    layers = sorted({type(x).__name__ for x in patched.modules() if type(x).__name__.startswith("Liger")})
    return {"error": max(errors).item(), "layers": layers}


if __name__ == "__main__":
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for name in sys.argv[2:]:
            print(json.dumps({name: pool.apply(measure, (name, Path(sys.argv[1]) / name))}), flush=True)
