"""The digits task: data, tokenizer, processor, models, supervised training, scoring."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import ProcessorMixin

pytest.importorskip("sklearn")


from vgs.digits import task as digits
from vgs.digits.grading import grade, greedy_answers
from vgs.digits.models import IMAGE, VIDEO, VISION_END, VISION_START, Shape, build_model, build_processor
from vgs.digits.pictures import (
    CELL,
    CONCLUSIONS,
    KINDS,
    NUMBERS,
    PLACES,
    READINGS,
    SPLITS,
    Habits,
    caption,
    conclude,
    digits_read,
    handwritten,
    number_words,
    phrase,
    scorer,
    split_indices,
    take,
)
from vgs.digits.pretraining import IGNORED, Phase, Recipe, encode, lesson, pretrained, train_supervised

TINY = Shape(layers=1, width=32, heads=2, vision_layers=1)


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    return build_model(TINY, processor, seed=0).eval()


def test_splits_are_disjoint_by_image_and_cover_all():
    parts = [set(split_indices(split).tolist()) for split in SPLITS]
    assert all(not a & b for a, b in itertools.combinations(parts, 2))
    assert set.union(*parts) == set(range(1797))
    assert len(parts[0]) > 5 * len(parts[2]) > 1000


@pytest.mark.parametrize("split", SPLITS)
def test_examples_use_only_their_split(split):
    allowed = set(split_indices(split).tolist())
    assert all(set(example.source) <= allowed for example in take(split, 100, seed=3))


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="'held-out'"):
        take("held-out", 1, seed=0)


def test_same_seed_same_data_other_seed_other_data():
    first, again, other = (take("train", 20, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert all(np.array_equal(np.asarray(a.image), np.asarray(b.image)) for a, b in zip(first, again, strict=True))
    assert first != other


def test_questions_and_answers_agree_with_the_labels():
    labels = handwritten()[1]
    seen = set()
    for example in take("train", 400, seed=0):
        shown = [int(labels[i]) for i in example.source]
        names = list(PLACES) if len(shown) == 3 else ["left", "right"]
        asked = [shown[names.index(name)] for name in names if name in example.question.split()]
        assert list(example.read) == asked
        expected = {
            "read": asked[0],
            "sum": sum(asked),
            "difference": max(asked) - min(asked),
            "larger": max(asked),
            "smaller": min(asked),
        }[example.kind]
        assert example.answer == NUMBERS[expected]
        assert scorer(example.target, example.answer)
        assert digits_read(example.target, example) == len(asked)
        seen.add((example.kind, len(shown)))
    assert seen == set(itertools.product(KINDS, (2, 3)))


def test_picture_shows_its_digits():
    example = take("train", 1, seed=0)[0]
    pixels = np.asarray(example.image)
    assert pixels.shape == (CELL, CELL * len(example.source), 3)
    for position in range(len(example.source)):
        assert pixels[:, position * CELL : (position + 1) * CELL].max() > 150


def test_captions_read_every_digit():
    labels = handwritten()[1]
    for example in map(caption, take("train", 20, seed=0)):
        assert number_words(example.target) == [int(labels[i]) for i in example.source] == list(example.read)


def test_habits_draw_by_weight():
    rng = np.random.default_rng(0)
    only = Habits((0, 0, 1, 0), (0, 1, 0, 0))
    assert {only.draw(rng) for _ in range(50)} == {(2, 1)}
    drawn = [Habits((3, 1, 0, 0), (1, 1, 1, 1)).draw(rng)[0] for _ in range(2000)]
    assert abs(drawn.count(0) / 2000 - 0.75) < 0.04


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("the left digit is three and the right digit is five , so the sum is eight .", "eight", True),
        ("left : three ; right : five . sum : eight .", "three", False),
        ("i see nine on the left , hence the answer must be nine .", "nine", True),
        ("i see nine on the left", "eight", False),
        ("so the sum is", "eight", False),
        ("", "zero", False),
    ],
)
def test_scorer(text, gold, right):
    assert scorer(text, gold) is right


def test_scorer_rejects_a_gold_answer_that_is_no_number():
    with pytest.raises(ValueError, match="'left'"):
        scorer("left", "left")


def test_tokenizer_knows_every_word(processor):
    tokenizer = processor.tokenizer
    texts = [text for example in take("train", 300, seed=5) for text in (example.question, example.target)]
    texts += [caption(example).question for example in take("train", 1, seed=5)]
    for kind, reading, conclusion in itertools.product(KINDS, range(len(READINGS)), range(len(CONCLUSIONS))):
        places = ["middle"] if kind == "read" else ["left", "right"]
        texts.append(phrase(kind, places, [9] * len(places), reading, conclusion))
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer("colourless")["input_ids"] == [tokenizer.unk_token_id]


def test_placeholders_equal_image_features(processor, model):
    examples = take("train", 8, seed=0)
    messages = [
        [{"role": "user", "content": [{"type": "image", "image": e.image}, {"type": "text", "text": e.question}]}]
        for e in examples
    ]
    batch = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    placeholders = batch["input_ids"] == processor.image_token_id
    assert placeholders.sum(1).tolist() == [len(e.source) for e in examples]
    assert torch.equal(placeholders.long(), batch["mm_token_type_ids"])
    features = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    assert sum(map(len, features)) == placeholders.sum()
    assert (batch["attention_mask"][:, -1] == 1).all()  # padded on the left
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_text_only_view_has_no_placeholder(processor):
    example = take("train", 1, seed=0)[0]
    text = processor.apply_chat_template(example.record()["prompt"], add_generation_prompt=True)
    assert example.question in text
    assert not any(token in text for token in (IMAGE, VIDEO, VISION_START, VISION_END))


def test_encode_labels_the_answer_only(processor):
    examples = take("train", 4, seed=0)
    shown = [False, True, True, False]
    batch = encode(processor, [lesson(example, seen) for example, seen in zip(examples, shown, strict=True)])
    for row, (example, seen) in enumerate(zip(examples, shown, strict=True)):
        labelled = batch["labels"][row][batch["labels"][row] != IGNORED]
        assert processor.tokenizer.decode(labelled) == f"{example.target} {processor.tokenizer.eos_token}"
        expected = len(example.source) if seen else 0
        assert (batch["input_ids"][row] == processor.image_token_id).sum() == expected


def test_supervised_training_lowers_the_loss(processor):
    student = build_model(TINY, processor, seed=1)
    phases = Phase(steps=4, batch_size=8, captions=True), Phase(steps=16, batch_size=8, learning_rate=1e-2)
    recipe = Recipe(TINY, phases, Habits())
    losses = train_supervised(student, processor, recipe, seed=0)
    assert len(losses) == 20
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[4:7])


def test_answers_end_and_hold_no_placeholder(processor, model):
    examples = take("test", 6, seed=0)
    answers = greedy_answers(model, processor, examples, max_new_tokens=12)
    assert len(answers) == 6
    end = processor.tokenizer.eos_token_id
    assert all(end not in answer[:-1] and len(answer) <= 12 for answer in answers)
    forbidden = set(model.generation_config.suppress_tokens)
    assert {processor.image_token_id, processor.video_token_id} <= forbidden
    assert not forbidden & set(itertools.chain.from_iterable(answers))


def test_grade_counts_answers_and_digits(processor):
    example = next(e for e in take("test", 50, seed=0) if e.kind == "sum" and sum(e.read) < 18)
    wrong = phrase("sum", ["left", "right"], [example.read[0], (example.read[1] + 1) % 10], 0, 0)
    ids = [processor.tokenizer(text)["input_ids"] for text in (example.target, wrong)]
    assert grade(processor, [example, example], ids) == {"answers": 0.5, "digits": 0.75}


def test_unknown_role_is_named(tmp_path):
    with pytest.raises(ValueError, match="'judge'"):
        pretrained("judge", tmp_path)


def test_build_gives_the_trainers_columns():
    dataset = digits.build("validation", 5, seed=2)
    assert dataset.column_names == ["prompt", "images", "answer"]
    for row, example in zip(dataset, take("validation", 5, seed=2), strict=True):
        assert row["prompt"] == [{"role": "user", "content": example.question}]
        assert row["answer"] == example.answer
        assert np.array_equal(np.asarray(row["images"][0]), np.asarray(example.image))


def test_conclude_is_symmetric_arithmetic():
    for a, b in itertools.product(range(10), repeat=2):
        assert conclude("sum", (a, b)) == conclude("sum", (b, a)) == a + b
        assert conclude("difference", (a, b)) == conclude("difference", (b, a)) >= 0
        assert {conclude("larger", (a, b)), conclude("smaller", (a, b))} == {a, b}


def test_a_prompt_that_was_encoded_before_is_not_encoded_again(monkeypatch):
    processor, question = build_processor(), take("test", 1, seed=11)[0]
    calls, encode = [], ProcessorMixin.__call__
    monkeypatch.setattr(ProcessorMixin, "__call__", lambda self, *x, **y: calls.append(1) or encode(self, *x, **y))
    options = {
        "text": [f"{VISION_START}{IMAGE}{VISION_END} what ?"],
        "images": [question.image],
        "return_tensors": "pt",
    }
    one, other = processor(**options), build_processor()(**options)
    assert len(calls) == 1 and one is not other
    assert all(torch.equal(one[name], other[name]) for name in one)
    processor(**{**options, "images": [take("test", 2, seed=11)[1].image]})
    processor.image_processor.image_mean = [0.5] * 3
    changed = processor(**options)
    assert len(calls) == 3 and not torch.equal(changed["pixel_values"], one["pixel_values"])
