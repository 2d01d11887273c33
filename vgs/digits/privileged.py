"""The digits task with context that only a teacher sees: clean, enlarged digits, or their labels in words.

The plain context is a faint picture with noise on a grey ground, which the task's models have never seen. The task's
teacher model has seen one picture a prompt and no notes, so that `reader` first shows it, on the training split, what a
second picture or a note is good for. The pictures beside such context are spoilt in another way there, so that it
learns nothing about faint ones.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import Qwen3VLForConditionalGeneration

from ..data.privileged import privileged_sample
from ..data.prompts import fill_images
from .models import DigitsProcessor
from .pictures import CELL, NUMBERS, PLACES, Example, draw_picture, examples, handwritten, take
from .pretraining import IGNORED, RECIPES, Recipe, pretrained

if TYPE_CHECKING:
    from datasets import Dataset

CONTEXTS = ("clean", "labels")
KINDS = (None, "clean", "labels", "labels")  # None: the task's own picture; notes are harder to learn
GROUND, CONTRAST, NOISE = 0.3, 0.4, 0.08  # of the plain context; the task's own pictures have 0, 1 and 0.05
LESSON_NOISE = 0.4  # of pictures that come with context while the reader is made


def clean_picture(example: Example) -> Image.Image:
    """The example's handwritten digits without noise, each as large as its cell."""
    canvas = np.zeros((CELL, CELL * len(example.source)), dtype=np.float32)
    for place, digit in enumerate(handwritten()[0][list(example.source)]):
        glyph = Image.fromarray(digit).resize((CELL, CELL), Image.Resampling.BILINEAR)
        canvas[:, CELL * place : CELL * (place + 1)] = np.asarray(glyph)
    return Image.fromarray((255 * np.clip(canvas, 0.0, 1.0)).astype(np.uint8)).convert("RGB")


def faint_picture(example: Example) -> Image.Image:
    """The example's picture with little contrast on a grey ground, with noise."""
    digits = handwritten()[0][list(example.source)]
    clear = np.asarray(draw_picture(digits, np.random.default_rng(example.seed), noise=0.0), dtype=np.float32) / 255
    noise = np.random.default_rng(example.seed + 1).normal(0.0, NOISE, clear.shape[:2])
    grey = GROUND + CONTRAST * clear[..., 0] + noise
    return Image.fromarray((255 * np.clip(grey, 0.0, 1.0)).astype(np.uint8)).convert("RGB")


def label_note(example: Example) -> str:
    """All digits of the picture in words, with their places."""
    places = list(PLACES) if len(example.source) == 3 else ["left", "right"]
    labels = handwritten()[1][list(example.source)]
    return " and ".join(f"i see {NUMBERS[x]} {PLACES[place]}" for x, place in zip(labels, places, strict=True))


@dataclass(frozen=True)
class Question:
    """An example in a faint picture; where it is `shown` with its context, it is as the teacher sees it."""

    example: Example
    context: str
    shown: bool = False

    @property
    def answer(self) -> str:
        return self.example.answer

    @property
    def read(self) -> tuple[int, ...]:
        return self.example.read

    @cached_property
    def sample(self) -> dict[str, Any]:
        """Prompt, faint picture, answer and a privileged column."""
        if self.context not in CONTEXTS:
            raise ValueError(f"context must be one of {', '.join(CONTEXTS)}, got {self.context!r}.")
        sample = {**self.example.record(), "images": [faint_picture(self.example)]}
        if self.context == "clean":
            return {**sample, "privileged_images": [clean_picture(self.example)]}
        return {**sample, "privileged_text": label_note(self.example)}

    def record(self) -> dict[str, Any]:
        """The row that trainers consume, or the prompt with its context."""
        return privileged_sample(self.sample) if self.shown else self.sample


def questions(split: str, size: int, seed: int = 0, context: str = "clean", shown: bool = False) -> list[Question]:
    """The task's examples (see `digits_data.take`) as questions about faint pictures."""
    return [Question(example, context, shown) for example in take(split, size, seed)]


def build(split: str, size: int, seed: int = 0, context: str = "clean") -> Dataset:
    """Questions as a dataset with the columns that `SelfDistillationTrainer` consumes.

    Args:
        split, size, seed: see `digits.build`.
        context: "clean" (`privileged_images`: one clean, enlarged picture) or "labels" (`privileged_text`).

    Returns:
        `prompt`, `images` (one faint picture), `answer` and the privileged column.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    column = {"clean": ("privileged_images", List(ImageFeature())), "labels": ("privileged_text", Value("string"))}
    features = {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "images": List(ImageFeature()),
        "answer": Value("string"),
    }
    records = [question.record() for question in questions(split, size, seed, context)]
    return Dataset.from_list(records, features=Features({**features, **dict([column[context]])}))


# ---- a model that can use such context


@dataclass(frozen=True)
class ReaderRecipe:
    """Supervised training on top of the task's teacher, on batches with `KINDS` in turn.

    The learning rate rises over ten steps and then falls linearly to a twentieth.
    """

    base: Recipe = RECIPES["teacher"]
    steps: int = 200
    batch_size: int = 48
    learning_rate: float = 1e-3

    def rate(self, step: int) -> float:
        """Fraction of `learning_rate` at a step."""
        return min((step + 1) / 10, 1.05 - step / self.steps)

    def key(self, seed: int) -> str:
        """A name for the model in the cache: changes with anything that can change its weights."""
        settings = f"{self.base.key(seed)} {self.steps} {self.batch_size} {self.learning_rate}"
        return hashlib.sha256(settings.encode() + Path(__file__).read_bytes()).hexdigest()[:16]


def _lesson(example: Example, context: str | None) -> dict[str, Any]:
    if context is None:
        return example.record()
    digits = handwritten()[0][list(example.source)]
    spoilt = draw_picture(digits, np.random.default_rng(example.seed), LESSON_NOISE)
    return privileged_sample({**Question(example, context).sample, "images": [spoilt]})


def _batches(recipe: ReaderRecipe, seed: int) -> Iterator[list[tuple[dict[str, Any], str]]]:
    stream = examples("train", 5000 + seed, recipe.base.habits)
    while True:
        batch = [next(stream) for _ in range(recipe.batch_size)]
        kinds = itertools.cycle(KINDS)
        yield [(_lesson(example, kind), example.target) for example, kind in zip(batch, kinds, strict=False)]


def _encode(processor: DigitsProcessor, batch: Sequence[tuple[dict[str, Any], str]]) -> dict[str, torch.Tensor]:
    tokenizer = processor.tokenizer
    messages = [fill_images(record["prompt"], record["images"]) for record, _ in batch]
    prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
    answers = [target + tokenizer.eos_token for _, target in batch]
    inputs = processor(
        text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        images=[record["images"] for record, _ in batch],
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, ids in enumerate(tokenizer(answers)["input_ids"]):
        labels[row, -len(ids) :] = torch.tensor(ids)
    return {**inputs, "labels": labels}


def _teach(
    model: Qwen3VLForConditionalGeneration, processor: DigitsProcessor, recipe: ReaderRecipe, seed: int, line: int
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.rate)
    stream = _batches(recipe, seed)
    for _ in tqdm(range(recipe.steps), desc="digits reader", unit="step", position=line, mininterval=0.5):
        model(**_encode(processor, next(stream)), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def reader(
    cache: Path, seed: int = 0, recipe: ReaderRecipe | None = None, line: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, DigitsProcessor]:
    """The model that distils itself, from the cache or trained now (under a minute on one core).

    Args:
        cache, seed, line: see `digits_training.pretrained`.
        recipe: other settings.
    """
    recipe = recipe or ReaderRecipe()
    model, processor = pretrained("teacher", cache, seed=seed, recipe=recipe.base, line=line)
    folder = Path(cache).expanduser() / f"digits-reader-{recipe.key(seed)}"
    if not folder.exists():
        _teach(model, processor, recipe, seed, line)
        unfinished = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
        model.save_pretrained(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process finished the same model first
            shutil.rmtree(unfinished)
    # as in `pretrained`: a fresh and a cached model are the same to the last bit
    return Qwen3VLForConditionalGeneration.from_pretrained(folder).eval(), processor
