"""Supervised training of the digits task's teacher and student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import Qwen3VLForConditionalGeneration

from ..data.messages import fill_images
from .cache import key, trained_once
from .models import DigitsProcessor, Shape, build_model, build_processor
from .pictures import NOISE, Example, Habits, caption, examples

IGNORED = -100

#: A row that trainers consume (``prompt``, ``images``), and the full answer to it.
Lesson = tuple[Mapping[str, Any], str]


@dataclass(frozen=True)
class Phase:
    """A stretch of supervised training.

    The fraction `text_only` of every batch has no picture. `captions` asks for nothing but the digits, which ties the
    vision tower to the words before they are needed in sentences; without it, vision does not start in this budget.
    The learning rate rises over the first twentieth of the steps and then falls linearly to a twentieth.
    """

    steps: int
    text_only: float = 0.25
    captions: bool = False
    learning_rate: float = 3e-3
    batch_size: int = 48

    def rate(self, step: int) -> float:
        """Fraction of `learning_rate` at a step."""
        return min((step + 1) / max(1, self.steps // 20), 0.05 + 0.95 * (1 - step / self.steps))


@dataclass(frozen=True)
class Recipe:
    """Everything that a trained model depends on, apart from the seed."""

    shape: Shape
    phases: tuple[Phase, ...]
    habits: Habits
    noise: float = NOISE


CAPTIONS, TEXT = {"text_only": 0.0, "captions": True}, {"text_only": 1.0}
RECIPES = {
    "teacher": Recipe(
        Shape(layers=3, width=96),
        (Phase(steps=250, **CAPTIONS), Phase(steps=350, **TEXT), Phase(steps=450)),
        Habits((0.4, 0.3, 0.2, 0.1), (0.4, 0.3, 0.2, 0.1)),
    ),
    # few pictures and much text: mature language, immature vision, and the opposite phrasing habits
    "student": Recipe(
        Shape(layers=2, width=64),
        (Phase(steps=150, **CAPTIONS), Phase(steps=600, **TEXT), Phase(steps=132, learning_rate=2e-3)),
        Habits((0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.4)),
    ),
}

#: Steps on captions and on pictures of the students on which steering is studied, the least mature vision first.
MATURITIES = {"weak": (100, 40), "fair": (150, 132), "good": (150, 210)}
NOISY = 0.2  # of the pictures that they and their teacher see


def noisy_recipes() -> dict[str, Recipe]:
    """A teacher, and students of the same language and three maturities of vision; all see noisy pictures."""
    found = {"teacher": replace(RECIPES["teacher"], noise=NOISY)}
    base = RECIPES["student"]
    for name, (captions, pictures) in MATURITIES.items():
        phases = (Phase(captions, **CAPTIONS), Phase(600, **TEXT), Phase(pictures, learning_rate=2e-3))
        found[name] = replace(base, phases=phases, noise=NOISY)
    return found


def encode(processor: DigitsProcessor, batch: Sequence[Lesson]) -> dict[str, torch.Tensor]:
    """Prompts and full answers as a batch.

    Args:
        processor: of the task.
        batch: B lessons; the prompt of one without images is rendered without an image item, so that no placeholder
            remains.

    Returns:
        What the model takes: ``input_ids``, ``attention_mask`` and ``mm_token_type_ids`` [B, L], padded on the left,
        the pictures, and ``labels`` [B, L], ``IGNORED`` but on the answer's tokens.
    """
    tokenizer = processor.tokenizer
    messages = [fill_images(record["prompt"], record["images"]) for record, _ in batch]
    prompts = processor.apply_chat_template(messages, add_generation_prompt=True)
    answers = [target + tokenizer.eos_token for _, target in batch]
    inputs = processor(
        text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        images=[record["images"] for record, _ in batch if record["images"]] or None,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, ids in enumerate(tokenizer(answers)["input_ids"]):
        labels[row, -len(ids) :] = torch.tensor(ids)
    return {**inputs, "labels": labels}


def lessons(phase: Phase, habits: Habits, seed: int, noise: float = NOISE) -> Iterator[list[Lesson]]:
    """Endless batches of a phase; the first of each batch have no picture.

    Args:
        phase: sizes and kinds of its batches.
        habits: of the speaker who answers.
        seed: of the questions.
        noise: of the pictures.
    """
    stream, blind = examples("train", seed, habits, noise), round(phase.text_only * phase.batch_size)
    while True:
        batch = [next(stream) for _ in range(phase.batch_size)]
        if phase.captions:
            batch = [caption(example) for example in batch]
        yield [lesson(example, shown=place >= blind) for place, example in enumerate(batch)]


def lesson(example: Example, shown: bool = True) -> Lesson:
    """An example with its full answer, with or without its picture."""
    return {"prompt": example.prompt(), "images": [example.image] if shown else []}, example.target


def fit(
    model: Qwen3VLForConditionalGeneration,
    processor: DigitsProcessor,
    stream: Iterator[Sequence[Lesson]],
    steps: int,
    learning_rate: float,
    rate: Callable[[int], float],
    bar: tqdm,
) -> list[float]:
    """Trains a model in place on batches of lessons with AdamW, and leaves it in evaluation mode.

    Args:
        model, processor: of the task.
        stream: at least ``steps`` batches.
        steps: of the optimizer.
        learning_rate, rate: the greatest learning rate, and the fraction of it at a step.
        bar: moves on with every step.

    Returns:
        The loss of every step, in nats per token.
    """
    losses: list[float] = []
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with ThreadPoolExecutor(1, "encode", torch.set_num_threads, (torch.get_num_threads(),)) as beside:
        following = beside.submit(lambda: encode(processor, next(stream)))
        for left in reversed(range(steps)):
            loss = model(**following.result(), use_cache=False).loss
            if left:  # PyTorch runs the whole backward without the interpreter, which is free to draw pictures
                following = beside.submit(lambda: encode(processor, next(stream)))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses


def progress_bar(steps: int, description: str, line: int) -> tqdm:
    """A progress bar on its own line, for several processes in one terminal."""
    return tqdm(total=steps, desc=description, unit="step", position=line, mininterval=0.5)


def train_supervised(
    model: Qwen3VLForConditionalGeneration,
    processor: DigitsProcessor,
    recipe: Recipe,
    seed: int,
    description: str = "training",
    line: int = 0,
) -> list[float]:
    """Trains in place on the phases of a recipe, each with a new optimizer.

    Args:
        model, processor: of the task.
        recipe: phases and habits.
        seed: of the questions.
        description, line: of the progress bar.

    Returns:
        The loss of every step, in nats per token.
    """
    losses: list[float] = []
    with progress_bar(sum(phase.steps for phase in recipe.phases), description, line) as bar:
        for number, phase in enumerate(recipe.phases):
            stream = lessons(phase, recipe.habits, 1000 * (seed + 1) + number, recipe.noise)
            losses += fit(model, processor, stream, phase.steps, phase.learning_rate, phase.rate, bar)
    return losses


def pretrained(
    role: str, cache: Path, seed: int = 0, recipe: Recipe | None = None, line: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, DigitsProcessor]:
    """The trained teacher or student with its processor, from the cache or trained now (about a minute on one core).

    Args:
        role: "teacher" or "student".
        cache: folder for trained models, see `cache.trained_once`.
        seed: initial weights and order of the data.
        recipe: other settings than the role's own.
        line: of the progress bar.

    Raises:
        ValueError: another role.
    """
    if role not in RECIPES:
        raise ValueError(f"role must be one of {sorted(RECIPES)}, got {role!r}")
    recipe, processor = recipe or RECIPES[role], build_processor()

    def train() -> Qwen3VLForConditionalGeneration:
        model = build_model(recipe.shape, processor, seed)
        train_supervised(model, processor, recipe, seed, description=f"digits {role}", line=line)
        return model

    return trained_once(cache, f"digits-{role}-{key(recipe, seed)}", train), processor
