"""Supervised training of the digits teacher and student, greedy answers, and the cache of trained models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import Qwen3VLForConditionalGeneration

from ..data.prompts import encode_prompts
from . import models as digits_models
from . import pictures as digits_data
from .models import DigitsProcessor, Shape, build_model, build_processor
from .pictures import Example, Habits, caption, digits_read, examples, scorer

IGNORED = -100


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

    def key(self, seed: int) -> str:
        """A name for the model in the cache: changes with anything that can change its weights."""
        versions = [torch.__version__, transformers.__version__, torch.get_num_threads()]
        settings = json.dumps([dataclasses.asdict(self), seed, versions], sort_keys=True)
        sources = [Path(module.__file__).read_bytes() for module in (digits_data, digits_models)]
        sources.append(Path(__file__).read_bytes())
        return hashlib.sha256(b"".join([settings.encode(), *sources])).hexdigest()[:16]


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


def encode(processor: DigitsProcessor, batch: Sequence[Example], pictures: Sequence) -> dict[str, torch.Tensor]:
    """Prompts and full answers as one right-aligned batch with labels on the answer tokens only.

    `pictures` gives each example's picture or None; without one the prompt is rendered without the image item, so that
    no placeholder remains.
    """
    tokenizer = processor.tokenizer
    prompts = processor.apply_chat_template(
        [conversation(example.question, picture) for example, picture in zip(batch, pictures, strict=True)],
        add_generation_prompt=True,
    )
    answers = [example.target + tokenizer.eos_token for example in batch]
    shown = [[picture] for picture in pictures if picture is not None]
    inputs = processor(
        text=[prompt + answer for prompt, answer in zip(prompts, answers, strict=True)],
        images=shown or None,
        padding=True,
        return_tensors="pt",
    )
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    for row, answer in zip(range(len(batch)), tokenizer(answers)["input_ids"], strict=True):
        labels[row, -len(answer) :] = torch.tensor(answer)
    return {**inputs, "labels": labels}


def conversation(question: str, picture: object | None) -> list[dict]:
    """One user message, with the picture before the question if there is one."""
    picture_part = [] if picture is None else [{"type": "image", "image": picture}]
    return [{"role": "user", "content": [*picture_part, {"type": "text", "text": question}]}]


def batches(phase: Phase, habits: Habits, seed: int) -> Iterator[tuple[list[Example], list]]:
    """Endless training batches: examples and, for each, its picture or None."""
    stream, blind = examples("train", seed, habits), round(phase.text_only * phase.batch_size)
    while True:
        batch = [next(stream) for _ in range(phase.batch_size)]
        if phase.captions:
            batch = [caption(example) for example in batch]
        yield batch, [None] * blind + [example.image for example in batch[blind:]]


def train_supervised(
    model: Qwen3VLForConditionalGeneration,
    processor: DigitsProcessor,
    recipe: Recipe,
    seed: int,
    description: str = "training",
    line: int = 0,
) -> list[float]:
    """Trains in place on the phases of `recipe`; returns the loss of every step.

    `line` is where the progress bar stands, for several processes in one terminal.
    """
    losses: list[float] = []
    model.train()
    bar = tqdm(
        total=sum(phase.steps for phase in recipe.phases), desc=description, unit="step", position=line, mininterval=0.5
    )
    for number, phase in enumerate(recipe.phases):
        optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.rate)
        stream = batches(phase, recipe.habits, 1000 * (seed + 1) + number)
        for _ in range(phase.steps):
            loss = model(**encode(processor, *next(stream)), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    bar.close()
    model.eval()
    return losses


@torch.no_grad()
def answer_greedily(
    model: Qwen3VLForConditionalGeneration,
    processor: DigitsProcessor,
    questions: Sequence[Example],
    batch_size: int = 128,
    max_new_tokens: int = 32,
) -> list[list[int]]:
    """Token ids of the greedy answers, up to and including the end token."""
    was_training, end = model.training, processor.tokenizer.eos_token_id
    model.eval()
    answers: list[list[int]] = []
    for start in range(0, len(questions), batch_size):
        part = [example.record() for example in questions[start : start + batch_size]]
        ids, mask, fields = encode_prompts(processor, part)
        generated = model.generate(
            input_ids=ids, attention_mask=mask, **fields, max_new_tokens=max_new_tokens, do_sample=False
        )
        for row in generated[:, ids.shape[1] :].tolist():
            answers.append(row[: row.index(end) + 1] if end in row else row)
    model.train(was_training)
    return answers


def grade(
    processor: DigitsProcessor, questions: Sequence[Example], answers: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Fractions of right answers and of rightly read digits."""
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    right = sum(scorer(text, example.answer) for text, example in zip(texts, questions, strict=True))
    read = sum(digits_read(text, example) for text, example in zip(texts, questions, strict=True))
    return {"answers": right / len(questions), "digits": read / sum(len(example.read) for example in questions)}


def accuracy(
    model: Qwen3VLForConditionalGeneration, processor: DigitsProcessor, questions: Sequence[Example]
) -> dict[str, float]:
    """`grade` of the model's greedy answers."""
    return grade(processor, questions, answer_greedily(model, processor, questions))


def pretrained(
    role: str, cache: Path, seed: int = 0, recipe: Recipe | None = None, line: int = 0
) -> tuple[Qwen3VLForConditionalGeneration, DigitsProcessor]:
    """The trained teacher or student, from the cache or trained now (about a minute on one core).

    Args:
        role: "teacher" or "student".
        cache: folder for trained models; a model's folder is named by a hash of its settings.
        seed: initial weights and order of the data.
        recipe: other settings than the role's own.
        line: of the progress bar, as in `train_supervised`.
    """
    if role not in RECIPES:
        raise ValueError(f"role must be one of {sorted(RECIPES)}, got {role!r}")
    recipe = recipe or RECIPES[role]
    processor = build_processor()
    folder = Path(cache).expanduser() / f"digits-{role}-{recipe.key(seed)}"
    if not folder.exists():
        model = build_model(recipe.shape, processor, seed)
        train_supervised(model, processor, recipe, seed, description=f"digits {role}", line=line)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-")
        model.save_pretrained(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process finished the same model first
            shutil.rmtree(unfinished)
    # always read back, so that a fresh and a cached model are the same to the last bit
    return Qwen3VLForConditionalGeneration.from_pretrained(folder).eval(), processor
