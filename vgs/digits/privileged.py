"""The digits task with context that only a teacher sees: clean, enlarged digits, or their labels in words.

The plain context is a faint picture with noise on a grey ground, which the task's models have never seen. The task's
teacher model has seen one picture a prompt and no notes, so that `reader` first shows it, on the training split, what a
second picture or a note is good for. The pictures beside such context are spoilt in another way there, so that it
learns nothing about faint ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from ..data.privileged import privileged_sample
from ..errors import ConfigError
from .cache import key, trained_once
from .models import DigitsProcessor, build_processor
from .pictures import CELL, NUMBERS, PLACES, Example, draw_picture, examples, handwritten, take
from .pretraining import RECIPES, Lesson, Recipe, fit, lesson, pretrained, progress_bar

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
        """The number word that counts."""
        return self.example.answer

    @property
    def read(self) -> tuple[int, ...]:
        """The digits that the answer reads, left to right."""
        return self.example.read

    @cached_property
    def sample(self) -> dict[str, Any]:
        """Prompt, faint picture, answer and a privileged column.

        Raises:
            ConfigError: an unknown context.
        """
        if self.context not in CONTEXTS:
            raise ConfigError(f"context must be one of {', '.join(CONTEXTS)}, got {self.context!r}.")
        sample = {**self.example.record(), "images": [faint_picture(self.example)]}
        if self.context == "clean":
            return {**sample, "privileged_images": [clean_picture(self.example)]}
        return {**sample, "privileged_text": label_note(self.example)}

    def record(self) -> dict[str, Any]:
        """The row that trainers consume, or the prompt with its context."""
        return privileged_sample(self.sample) if self.shown else self.sample


def questions(split: str, size: int, seed: int = 0, context: str = "clean", shown: bool = False) -> list[Question]:
    """The task's examples (see `pictures.take`) as questions about faint pictures.

    Args:
        split, size, seed: see `pictures.take`.
        context: of `CONTEXTS`, what a teacher is shown.
        shown: whether their `record` is the teacher's view.
    """
    return [Question(example, context, shown) for example in take(split, size, seed)]


def build(split: str, size: int, seed: int = 0, context: str = "clean") -> Dataset:
    """Questions as a dataset with the columns that `SelfDistillationTrainer` consumes.

    Args:
        split, size, seed: see `task.build`.
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


def lesson_with(context: str | None, example: Example) -> Lesson:
    """An example with its full answer: the task's own, or with context beside a picture that is spoilt by noise."""
    if context is None:
        return lesson(example)
    digits = handwritten()[0][list(example.source)]
    spoilt = draw_picture(digits, np.random.default_rng(example.seed), LESSON_NOISE)
    return privileged_sample({**Question(example, context).sample, "images": [spoilt]}), example.target


def lessons(recipe: ReaderRecipe, seed: int) -> Iterator[list[Lesson]]:
    """Endless batches with `KINDS` of context in turn."""
    stream = examples("train", 5000 + seed, recipe.base.habits)
    while True:
        batch = [next(stream) for _ in range(recipe.batch_size)]
        yield [lesson_with(kind, example) for kind, example in zip(itertools.cycle(KINDS), batch, strict=False)]


def reader(
    cache: Path, seed: int = 0, recipe: ReaderRecipe | None = None, line: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, DigitsProcessor]:
    """The model that distils itself, from the cache or trained now (under a minute on one core).

    Args:
        cache, seed, line: see `pretraining.pretrained`.
        recipe: other settings.
    """
    recipe, processor = recipe or ReaderRecipe(), build_processor()

    def train() -> Qwen3VLForConditionalGeneration:
        model, _ = pretrained("teacher", cache, seed=seed, recipe=recipe.base, line=line)
        with progress_bar(recipe.steps, "digits reader", line) as bar:
            fit(model, processor, lessons(recipe, seed), recipe.steps, recipe.learning_rate, recipe.rate, bar)
        return model

    return trained_once(cache, f"digits-reader-{key(recipe, seed)}", train), processor
