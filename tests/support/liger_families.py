"""Which families' Liger patches work beside the installed transformers.

    python tests/support/liger_families.py FOLDER [FAMILY ...]

Prints one JSON object: family -> a sentence, or how far loss and gradients of the patched model are from its own.
Each family has a process of its own, since patches stay. Liger's kernels run in Triton's interpreter.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from real_checkpoints import REAL_FAMILIES, photo_samples, real_checkpoint
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from triton.language.extra import libdevice

from vgs import vgs_step

# The interpreter has no libdevice: its functions return None there.
libdevice.rsqrt, libdevice.tanh = lambda x: 1 / tl.sqrt(x), lambda x: 1 - 2 / (tl.exp(2 * x) + 1)
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as PATCHES  # noqa: E402

#: Families that Liger says it patches, of those with a real checkpoint here.
FAMILIES = tuple(name for name in REAL_FAMILIES if name in PATCHES)


def scalars_as_compiled(convert: Any) -> Any:
    """The interpreter hands a kernel's floats over as Python's, where the compiler makes float32 scalars of them."""

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    return converted


def step(student: Any, teacher: Any, processor: Any, samples: list[dict]) -> dict[str, Tensor]:
    """The loss and the gradients of one batch."""
    ids = processor.tokenizer("seven or nine ?", add_special_tokens=False)["input_ids"]
    loss = vgs_step(student, teacher, processor, samples, [[ids]] * len(samples), "vgs", backend="torch").loss
    loss.backward()
    return {"loss": loss.detach(), **{name: x.grad for name, x in student.named_parameters() if x.grad is not None}}


def measure(family: str, folder: Path) -> str | dict[str, Any]:
    """What comes of patching a family's classes, as a user does before loading a model."""
    student, teacher = (
        real_checkpoint(family, folder / name, teacher=name == "teacher") for name in ("own", "teacher")
    )
    samples, processor = photo_samples(folder)[:1], AutoProcessor.from_pretrained(student)
    taught = AutoModelForImageTextToText.from_pretrained(teacher, dtype=torch.float32).eval()
    plain = step(AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32), taught, processor, samples)
    try:
        PATCHES[family](fused_linear_cross_entropy=False)  # vgs_step forms no logits
        patched = AutoModelForImageTextToText.from_pretrained(student, dtype=torch.float32)
        found = step(patched, taught, processor, samples)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    errors = [(found[name] - x).abs().max() / x.abs().max().clamp(min=1e-4) for name, x in plain.items()]
    layers = sorted({type(x).__name__ for x in patched.modules() if type(x).__name__.startswith("Liger")})
    return {"error": max(errors).item(), "layers": layers}


if __name__ == "__main__":
    interpreter._implicit_cvt = scalars_as_compiled(interpreter._implicit_cvt)
    names = sys.argv[2:] or FAMILIES
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(measure, [(name, Path(sys.argv[1]) / name) for name in names], chunksize=1)
    print(json.dumps(dict(zip(names, found, strict=True)), indent=1))
