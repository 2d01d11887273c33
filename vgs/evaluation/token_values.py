"""What student and teacher think of every token of some answers, kept in files with the pictures that were asked about.

``samples-STEP.json`` holds the answers of one step and names its pictures, which are made small: ``sample-HASH.png``,
by the hash of what they show. So one that many steps ask about is kept once, and another never takes its place.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vgs_kernels import fused_linear_divergence

from ..disk import write_whole
from ..models.heads import Head, token_logps, visual_dependency
from ..models.tokenizers import tokenizer_of

FORM = 1
#: Longest side of a kept picture, in pixels, and most tokens of a kept answer.
PIXELS, TOKENS = 320, 512


def token_values(
    student_rows: Sequence[Tensor],
    student_head: Head,
    teacher_rows: Sequence[Tensor],
    teacher_head: Head,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Values of N answer tokens, in nats.

    Args:
        student_rows, teacher_rows: [N, D] hidden states with and without images.
        student_head, teacher_head: from ``read_head``.
        token_ids: [N] int64.
        temperature: divides the logits. vocab_size: leading columns in use; None for all.

    Returns:
        ``vds`` and ``student_vds``: how much the image changes the teacher's and the student's distribution, KL with
        image from without. ``teacher_gain`` and ``gain``: how much likelier it makes the token itself, log p(y | image)
        - log p(y | text). ``standard``: KL(student || teacher), with image. All [N].
    """
    options = {"vocab_size": vocab_size}
    found = {}
    for name, gain, rows, head in (
        ("vds", "teacher_gain", teacher_rows, teacher_head),
        ("student_vds", "gain", student_rows, student_head),
    ):
        found[name] = visual_dependency(rows, head, temperature, **options)
        with_image, without = (token_logps(x, token_ids, head, temperature, **options) for x in rows)
        found[gain] = with_image - without
    output = fused_linear_divergence(
        student_rows[0],
        student_head.weight,
        [teacher_head.target(teacher_rows[0])],
        temperature=temperature,
        **student_head.student_options,
        **options,
    )
    return {**found, "standard": output.divergence}


def token_texts(processor: Any, ids: Sequence[int]) -> list[str]:
    """Every token as text of its own.

    Args:
        processor: a processor or a tokenizer. ids: of the tokens.
    """
    return [tokenizer_of(processor).decode([token]) for token in ids]


def write_samples(
    folder: Path,
    step: int,
    processor: Any,
    samples: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[int]],
    values: Sequence[Mapping[str, Tensor]],
    right: Sequence[bool | None],
) -> None:
    """Keep answers and the values of their first ``TOKENS`` tokens.

    Args:
        folder: made if missing. step: when they were given.
        processor: of the student.
        samples: ``prompt`` (chat messages), ``images`` (PIL) and, if there is one, ``answer``.
        answers: token ids, one answer to each. values: of ``token_values``, one entry an answer.
        right: whether they are; None where nobody knows.
    """
    entries = []
    for sample, ids, own, verdict in zip(samples, answers, values, right, strict=True):
        entries.append(
            {
                "question": _question(sample["prompt"]),
                "answer": sample.get("answer"),
                "images": [_keep_picture(folder, image) for image in sample["images"]],
                "tokens": token_texts(processor, ids[:TOKENS]),
                "left_out": max(len(ids) - TOKENS, 0),
                "terms": {name: [round(x, 5) for x in column[:TOKENS].tolist()] for name, column in own.items()},
                "right": verdict,
            }
        )
    keep(folder / f"samples-{step:06d}.json", {"kind": "samples", "form": FORM, "step": step, "samples": entries})


def keep(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record of an instrument, whole or not at all.

    Args:
        path: of the file. record: plain JSON; NaN and infinities, which JSON has not, become null.
    """
    write_whole(path, (json.dumps(_finite(record), indent=1, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_picture(folder: Path, image: Any) -> str:
    """The name of a picture's file, which is written unless it is there."""
    small = image.convert("RGB")
    small.thumbnail((PIXELS, PIXELS))
    content = io.BytesIO()
    small.save(content, "PNG")
    name = f"sample-{hashlib.sha256(content.getvalue()).hexdigest()[:16]}.png"
    if not (folder / name).exists():
        write_whole(folder / name, content.getvalue())
    return name


def _question(prompt: Any) -> str:
    """The last user message of a prompt, as text."""
    if isinstance(prompt, str):
        return prompt
    content = next(message["content"] for message in reversed(prompt) if message["role"] == "user")
    if isinstance(content, str):
        return content
    return " ".join(part["text"].strip() for part in content if part.get("type") == "text").strip()
