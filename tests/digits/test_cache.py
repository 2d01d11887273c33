"""The cache of trained models: what is in a key, what is not, and that two trainings at once do not clash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from vgs.digits import cache
from vgs.digits.models import Shape, build_model, build_processor
from vgs.digits.pictures import Habits, caption, take
from vgs.digits.pretraining import RECIPES, Phase, Recipe, encode, lesson, pretrained
from vgs.digits.privileged import CONTEXTS, ReaderRecipe, lesson_with, questions, reader

TINY = Shape(layers=1, width=32, heads=2, vision_layers=1)
RECIPE = Recipe(TINY, (Phase(steps=2, batch_size=4),), Habits())


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_pretrained_is_cached_and_reproducible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = pretrained("student", tmp_path / "a", seed=3, recipe=RECIPE)
    again, _ = pretrained("student", tmp_path / "b", seed=3, recipe=RECIPE)
    assert same_weights(trained, again)
    monkeypatch.setattr("vgs.digits.pretraining.train_supervised", None)  # calling it again would fail
    cached, processor = pretrained("student", tmp_path / "a", seed=3, recipe=RECIPE)
    assert same_weights(trained, cached) and not cached.training
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == [f"digits-student-{cache.key(RECIPE, 3)}"]
    assert cached.generation_config.suppress_tokens == trained.generation_config.suppress_tokens
    assert cached.config.text_config.vocab_size == len(processor.tokenizer)


def test_the_reader_needs_no_teacher_once_it_is_trained(tmp_path: Path) -> None:
    recipe = ReaderRecipe(RECIPE, steps=2, batch_size=4)
    trained, _ = reader(tmp_path, seed=1, recipe=recipe)
    base, _ = pretrained("teacher", tmp_path, seed=1, recipe=RECIPE)
    assert not same_weights(trained, base)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {f"digits-teacher-{cache.key(RECIPE, 1)}", f"digits-reader-{cache.key(recipe, 1)}"}
    shutil.rmtree(tmp_path / f"digits-teacher-{cache.key(RECIPE, 1)}")
    assert same_weights(reader(tmp_path, seed=1, recipe=recipe)[0], trained)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_first_of_two_trainings_at_once_wins(tmp_path: Path) -> None:
    """Each writes a folder of its own; the later one is given up, and nothing unfinished is left."""
    processor = build_processor()
    first, second = (build_model(TINY, processor, seed) for seed in (0, 1))

    def train() -> torch.nn.Module:
        cache.trained_once(tmp_path, "model", lambda: first)  # another process, meanwhile
        return second

    assert same_weights(cache.trained_once(tmp_path, "model", train), first)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_key_depends_on_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [
        dataclasses.replace(RECIPE, shape=Shape(layers=2, width=32)),
        dataclasses.replace(RECIPE, phases=(Phase(steps=3, batch_size=4),)),
        dataclasses.replace(RECIPE, habits=Habits(readings=(1, 2, 3, 4))),
        ReaderRecipe(RECIPE),
        ReaderRecipe(dataclasses.replace(RECIPE, shape=Shape(layers=2, width=32))),
        ReaderRecipe(RECIPE, learning_rate=1e-4),
    ]
    keys = [cache.key(RECIPE, 0), cache.key(RECIPE, 1), *(cache.key(other, 0) for other in others)]
    monkeypatch.setattr(cache, "TASK_VERSION", cache.TASK_VERSION + 1)
    keys.append(cache.key(RECIPE, 0))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(cache.key(RECIPE, 0))
    assert len(set(keys)) == len(keys)


def test_what_models_are_made_of_has_its_version() -> None:
    """Where this fails, other weights come of the same recipes: raise ``TASK_VERSION`` and put the new digest here."""
    digest, processor = hashlib.sha256(), build_processor()
    batches = []
    for habits in (RECIPES["teacher"].habits, RECIPES["student"].habits):
        batch = take("train", 12, 1000, habits)
        shown = questions("test", 4, context="clean"), questions("test", 4, context="labels")
        batches += [
            [lesson(example, place > 2) for place, example in enumerate(batch)],
            [lesson(caption(example)) for example in batch],
            *([lesson_with(context, example) for example in batch] for context in CONTEXTS),
            [(question.record(), question.answer) for part in shown for question in part],
        ]
    for batch in batches:
        for name, values in sorted(encode(processor, batch).items()):
            rounded = np.round(values.numpy(), 2) + 0.0 if values.is_floating_point() else values.numpy()
            digest.update(name.encode() + rounded.tobytes())
    for recipe in RECIPES.values():
        model = build_model(recipe.shape, processor, 0)
        shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        digest.update(json.dumps([shapes, model.generation_config.suppress_tokens]).encode())
    assert (cache.TASK_VERSION, digest.hexdigest()[:16]) == (1, "da62aea40c1f309b")
