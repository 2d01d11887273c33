"""Tiny checkpoints as users have them: a random model and its real processor on disk, read by the Auto classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from families import shaken
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from . import fields, gemma, grids, linear, llava, qwen, tiles
from .texts import SPEECH as USUAL_SPEECH

RECIPES = {**qwen.RECIPES, **grids.RECIPES, **tiles.RECIPES, **llava.RECIPES, **gemma.RECIPES, **linear.RECIPES}
SPEECH = {**USUAL_SPEECH, **grids.SPEECH, **tiles.SPEECH, **llava.SPEECH, **gemma.SPEECH, **linear.SPEECH}

#: Families with a real checkpoint here, and further ones, whose image fields have rules of their own.
#: Those that the oldest library does not know yet are left out there.
REAL_FAMILIES, FIELD_FAMILIES = tuple(RECIPES), tuple(x for x in fields.RECIPES if x in CONFIG_MAPPING)
HEAD = 16  # dimensions of an attention head
#: (width, height) in pixels of the photos.
SIZES = ((48, 32), (32, 64))


def real_checkpoint(family: str, folder: Path, *, teacher: bool = False) -> Path:
    """Save a tiny random model of a family with its real processor and tokenizer.

    Student and teacher share processor and vocabulary. The student has two layers of width 32 and a tied head, the
    teacher three heads, width 48 and a head of its own.

    Args:
        family: one of ``REAL_FAMILIES`` or ``FIELD_FAMILIES``.
        folder: where to save; made if it does not exist.
        teacher: which of the two.

    Returns:
        ``folder``, for ``AutoProcessor`` and ``AutoModelForImageTextToText``.
    """
    speech, recipe = (SPEECH | fields.SPEECH)[family], (RECIPES | fields.RECIPES)[family]
    tokenizer = speech.tokenizer()
    ids = dict(tokenizer.get_vocab())
    heads = 3 if teacher else 2
    text = {
        "vocab_size": -(-len(ids) // 64) * 64,  # padded, as published heads are
        "hidden_size": HEAD * heads,
        "intermediate_size": 2 * HEAD * heads,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": HEAD,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(int(teacher))
    model = shaken(AutoModelForImageTextToText.from_config(recipe.config(text, ids, not teacher)))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[ids[token] for token in (tokenizer.eos_token, *speech.stops)],
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
    )
    model.save_pretrained(folder)
    recipe.processor(tokenizer).save_pretrained(folder)
    return folder


def pair(checkpoint: Callable[..., Path], family: str) -> dict[str, Any]:
    """Student, teacher and processor as a user loads them, by the names that trainers give them."""
    folders = checkpoint(family), checkpoint(family, teacher=True)
    student, teacher = (AutoModelForImageTextToText.from_pretrained(x, attn_implementation="sdpa") for x in folders)
    processor = AutoProcessor.from_pretrained(folders[0])
    return {"model": student, "teacher_model": teacher, "processing_class": processor}


def photos(folder: Path, count: int = 4) -> list[Path]:
    """Save JPEG files of coloured noise, of two sizes by turns."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        width, height = SIZES[number % 2]
        generator = torch.Generator().manual_seed(number)
        coarse = torch.randint(0, 256, (height // 8, width // 8, 3), generator=generator, dtype=torch.uint8)
        paths.append(folder / f"photo_{number}.jpg")
        Image.fromarray(coarse.numpy(), mode="RGB").resize((width, height)).save(paths[-1], quality=95)
    return paths


def photo_samples(folder: Path) -> list[dict]:
    """Samples in the shared format: one image, two images of different sizes, none; prompts of different lengths."""
    images = [Image.open(path).convert("RGB") for path in photos(folder)]
    questions = ["what is in the picture ?", "how many squares are there in the second picture ?", "seven or nine ?"]
    chosen = [images[:1], images[1:3], []]
    return [
        {"prompt": [{"role": "user", "content": question}], "images": own, "answer": "seven"}
        for question, own in zip(questions, chosen, strict=True)
    ]
