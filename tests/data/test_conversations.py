"""Chat messages, marks and gold answers: every picture in its place, every change said."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import datasets
import pytest
from tiny import UNKNOWN, tiny_image, tiny_processor

from vgs.data.conversations import BadRow, read_answer, read_question
from vgs.data.prompts import encode_groups, encode_prompts
from vgs.data.sources import DataSource, Samples, load_samples
from vgs.errors import ConfigError

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed in (1, 2, 3):
        tiny_image(seed).save(tmp_path / f"{seed}.png")
    return tmp_path


def load(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Samples:
    """Through JSONL."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_samples(DataSource(str(path), **options))


def seeds(sample: dict[str, Any]) -> list[int]:
    """Which pictures a sample holds, in order."""
    known = {tiny_image(seed).tobytes(): seed for seed in (1, 2, 3)}
    return [known[image.tobytes()] for image in sample["images"]]


@pytest.mark.parametrize(
    ("question", "content"),
    [
        ("red ?", "red ?"),
        ("<image>\n<image>\nred ?", [IMAGE, IMAGE, text("red ?")]),
        ("is <image> or <image> red ?", [text("is "), IMAGE, text(" or "), IMAGE, text(" red ?")]),
        ("<image> left of <image>", [IMAGE, text("left of "), IMAGE]),
        ("  red <image><image>  ", [text("red "), IMAGE, IMAGE]),
        ("<image 1> or <image 2> ?", [IMAGE, text("or "), IMAGE, text(" ?")]),
    ],
)
def test_marks_keep_their_places(folder: Path, question: str, content: Any) -> None:
    samples = load(folder, [{"question": question, "answer": "a", "images": ["1.png", "2.png"]}])
    assert samples[0]["prompt"] == [{"role": "user", "content": content}]
    assert seeds(samples[0]) == [1, 2]


def test_numbered_marks_name_their_pictures(folder: Path) -> None:
    samples = load(folder, [{"question": "is <image2> as <image1> ?", "answer": "a", "images": ["1.png", "2.png"]}])
    assert seeds(samples[0]) == [2, 1]


def test_rendered_prompts_have_the_pictures_where_the_marks_stand(folder: Path) -> None:
    processor = tiny_processor()
    samples = load(folder, [{"question": "red <image> or <image> blue ?", "answer": "a", "images": ["1.png", "2.png"]}])
    ids, _, fields = encode_prompts(processor, [samples[0]])
    words = processor.tokenizer.decode(ids[0]).replace("<|image_pad|>", "").split()
    picture = ["<|vision_start|>", "<|vision_end|>"]
    assert words[2:-3] == ["red", *picture, UNKNOWN, *picture, "blue", "?"]
    alone = encode_prompts(processor, [{**samples[0], "prompt": samples[0]["prompt"]}])[2]
    assert alone["pixel_values"].equal(fields["pixel_values"])
    (group,) = encode_groups(processor, [samples[0]], [[]], [3, 4, 5, 6])
    assert processor.tokenizer.decode(group.text_prompt_ids).split()[2:-3] == ["red", UNKNOWN, "blue", "?"]


@pytest.mark.parametrize(
    ("question", "images", "says"),
    [
        ("<image> red ?", ["1.png", "2.png"], "has 1 place for images .* but column 'images' holds 2"),
        ("<image> <image> red ?", "1.png", "has 2 places for images .* holds 1"),
        ("<image> red ?", None, "has 1 place for images .* holds 0"),
        ("<image 1> <image 1> ?", ["1.png", "2.png"], "names the images <image 1>, <image 1>, expected each of 1 to 2"),
        ("<image 1> <image> ?", ["1.png", "2.png"], "names the images <image 1>, <image>"),
        ("<image 2> ?", ["1.png"], "names the images <image 2>"),
        (None, "1.png", "is None, expected text or chat messages"),
        (" ", "1.png", "is empty"),
        ("<image>", "1.png", "is empty"),
    ],
)
def test_marks_and_pictures_that_do_not_match_name_the_row(folder: Path, question: Any, images: Any, says: str) -> None:
    rows = [
        {"question": "red ?", "answer": "a", "images": ["1.png"]},
        {"question": question, "answer": "a", "images": images},
    ]
    samples = load(folder, rows)
    assert seeds(samples[0]) == [1]
    with pytest.raises(ConfigError, match=rf"^Row 1 of .*data.jsonl: 'question' {says}"):
        samples[1]


TURNS = [("user", "<image>\nred ?"), ("assistant", "yes"), ("user", "blue ?"), ("assistant", "no")]
EXPECTED = [
    {"role": "user", "content": [IMAGE, text("red ?")]},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "blue ?"},
]


@pytest.mark.parametrize(
    ("column", "turns"),
    [
        ("messages", [{"role": role, "content": content} for role, content in TURNS]),
        ("prompt", [{"role": role, "content": content} for role, content in TURNS]),
        (
            "conversations",
            [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS],
        ),
    ],
)
def test_chat_messages_and_sharegpt(folder: Path, column: str, turns: Any) -> None:
    """The last assistant turn is the gold answer, no part of the prompt; a column with answers comes before it."""
    row = {column: turns, "image": "1.png"}
    for extra, options, gold in (
        ({}, {}, {"answer": "no"}),
        ({"answer": "maybe"}, {}, {"answer": "maybe"}),
        ({"solution": 3}, {}, {"answer": "3"}),
        ({}, {"answer": None}, {}),
    ):
        (sample,) = load(folder, [{**row, **extra}], **options)
        assert sample.pop("prompt") == EXPECTED
        assert seeds({"images": sample.pop("images")}) == [1]
        assert sample == gold
    (sample,) = load(folder, [{**row, column: turns[:-1]}])
    assert (sample["prompt"], sample["answer"]) == (EXPECTED, None), "no assistant turn at the end: no gold answer"


def test_conversations_without_a_reply_are_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"from": "human", "value": "red ?"}, {"from": "gpt", "value": "yes"}]
    load(folder, [{"conversations": turns}, {"conversations": turns[:1]}, {"conversations": turns}])
    assert "conversations in 1 of 3 rows does not end with an assistant turn: no gold answer (rows 1)." in caplog.text


def test_chat_messages_written_as_json(folder: Path) -> None:
    turns = json.dumps([{"role": role, "content": content} for role, content in TURNS])
    (sample,) = load(folder, [{"messages": turns, "image": "1.png", "answer": "maybe"}])
    assert (sample["prompt"], sample["answer"]) == (EXPECTED, "maybe")


def test_trl_prompts_hold_their_own_pictures(folder: Path) -> None:
    """Image parts with a picture of their own, in every form, and open ones that ``images`` fills, in order."""
    parts = [
        {"type": "image", "image": "1.png"},
        text("or"),
        {"type": "image_url", "image_url": {"url": (folder / "2.png").as_uri()}},
        IMAGE,
        {"type": "image", "path": "1.png"},
        text("red ?"),
    ]
    row = {"prompt": [{"role": "system", "content": "answer"}, {"role": "user", "content": parts}], "images": ["3.png"]}
    (sample,) = load(folder, [row])
    expected = [IMAGE, text("or"), IMAGE, IMAGE, IMAGE, text("red ?")]
    assert sample["prompt"] == [{"role": "system", "content": "answer"}, {"role": "user", "content": expected}]
    assert seeds(sample) == [1, 2, 3, 1]
    encoded = encode_prompts(tiny_processor(), [sample])[2]
    assert len(encoded["image_grid_thw"]) == 4
    del row["images"]
    with pytest.raises(ConfigError, match=r"Row 0 of .* 'prompt' has 1 place for images .* but the row has 0"):
        load(folder, [row])[0]


def test_pictures_beside_parts_without_any_come_first(folder: Path) -> None:
    messages = [{"role": "system", "content": "answer"}, {"role": "user", "content": [text("red ?")]}]
    (sample,) = load(folder, [{"messages": messages, "images": ["1.png", "2.png"]}])
    assert sample["prompt"][1]["content"] == [IMAGE, IMAGE, text("red ?")]
    encode_prompts(tiny_processor(), [sample])


def test_string_prompts(folder: Path) -> None:
    (sample,) = load(folder, [{"prompt": "red ?", "image": "1.png", "solution": "a"}])
    assert sample["prompt"] == [{"role": "user", "content": "red ?"}]
    assert (seeds(sample), sample["answer"]) == ([1], "a")


def test_messages_of_parquet_have_no_empty_keys(folder: Path) -> None:
    """Arrow gives every part the keys of all: those without a value are not there."""
    content = [{"type": "image", "image": "1.png"}, {"type": "text", "text": "red ?"}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        }
    ]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    (sample,) = load_samples(DataSource(str(folder / "data.parquet")))
    assert sample["prompt"] == [{"role": "user", "content": [IMAGE, text("red ?")]}]
    assert sample["answer"] == "a"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "is \\[\\], expected text or chat messages"),
        ([{"role": "assistant", "content": "a"}], "has no user message"),
        ([{"role": "system", "content": "a"}], "has no user message"),
        ([{"role": "narrator", "content": "a"}], "a message of the role 'narrator', expected one of user, human"),
        ([{"role": "user", "content": None}], "a message of the role 'user' without content"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
            "the content part .* expected one of the type",
        ),
        ([{"role": "user", "content": 7}], "has the content 7, expected text or content parts"),
        (7, "is 7, expected text or chat messages"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "image": "1.png"}]}],
            "ends with an assistant turn that holds a picture",
        ),
    ],
)
def test_messages_that_cannot_be_read(folder: Path, messages: Any, says: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "red ?"}]}, {"messages": messages}]
    with pytest.raises(ConfigError, match=rf"^Row 1 of .*: 'messages' .*{says}"):
        load(folder, rows)[1]


def test_a_system_prompt_does_not_hide_one_of_the_data(folder: Path) -> None:
    messages = [{"role": "user", "content": "red ?"}]
    (sample,) = load(folder, [{"messages": messages}], system_prompt="think")
    assert sample["prompt"] == [{"role": "system", "content": "think"}, *messages]
    own = [{"role": "system", "content": "answer"}, *messages]
    with pytest.raises(ConfigError, match="has a system message of its own beside system_prompt"):
        load(folder, [{"messages": own}], system_prompt="think")[0]


def test_questions_in_several_columns_must_be_named(folder: Path) -> None:
    row = {"question": "red ?", "messages": [{"role": "user", "content": "blue ?"}], "answer": "a", "images": None}
    with pytest.raises(ConfigError, match="has the columns question, messages: say with the key 'question'"):
        load(folder, [row])
    assert load(folder, [row], question="question")[0]["prompt"][0]["content"] == "red ?"
    assert load(folder, [row], question="messages")[0]["prompt"][0]["content"] == "blue ?"


def test_missing_columns_are_one_sentence(folder: Path) -> None:
    for row, key in (
        ({"ask": "red ?", "answer": "a", "images": None}, "question"),
        ({"question": "red ?", "images": None}, "answer"),
        ({"question": "red ?", "answer": "a"}, "images"),
    ):
        with pytest.raises(ConfigError, match=rf"no column '{key}'; its columns are .*\(the key '{key}' names"):
            load(folder, [row])
    assert load(folder, [{"question": "red ?"}], answer=None, images=None)[0]["images"] == []
    for key in ("question", "answer", "images"):
        with pytest.raises(ConfigError, match="no column 'typo'"):
            load(folder, [{"question": "red ?", "answer": "a", "images": None}], **{key: "typo"})


GOLDS = [
    (None, None),
    (["7", "seven"], ["7", "seven"]),
    (12, "12"),
    (0.5, "0.5"),
    (True, "True"),
    ("", None),
    (" a ", "a"),
    ([], None),
    ([7, None], ["7"]),
    ("None", "None"),
]


def test_answers_of_every_kind(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"question": "red ?", "answer": gold, "images": None} for gold, _ in GOLDS]
    with caplog.at_level(logging.WARNING):
        samples = load(folder, rows)
    assert [sample["answer"] for sample in samples] == [expected for _, expected in GOLDS]
    lines = [record.message.split("data.jsonl: ")[1] for record in caplog.records]
    assert lines == [
        "answer in 3 of 10 rows is null or empty: no gold answer, so no accuracy and no reward for it (rows 0, 5, 7).",
        "answer in 3 of 10 rows is a number, a boolean or a time: taken as text (rows 2, 3, 4).",
        "answer in 2 of 10 rows is a list: each of its answers is right (rows 1, 8).",
    ]


def test_numbers_of_a_mixed_column_stay_what_they_are(folder: Path) -> None:
    """As soon as one number of a column is a float, all are."""
    rows = [{"question": "red ?", "answer": gold, "images": None} for gold in (12, 0.5, None)]
    assert [sample["answer"] for sample in load(folder, rows)] == ["12", "0.5", None]
    datasets.Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    samples = load_samples(DataSource(str(folder / "data.parquet")))
    assert [sample["answer"] for sample in samples] == ["12", "0.5", None]


def test_answers_that_are_none(folder: Path) -> None:
    rows = [{"question": "red ?", "answer": {"text": "a"}, "images": None}]
    with pytest.raises(ConfigError, match=r"Row 0 of .*: 'answer' is \{'text': 'a'\}, expected text, a number, a list"):
        load(folder, rows)[0]


def test_public_functions_alone() -> None:
    question = read_question("<image> red ?", ["x"], "question")
    assert (question.prompt[0]["content"], question.images, question.reply) == ([IMAGE, text("red ?")], ["x"], None)
    assert read_answer(float("nan"), "answer") is None


def _anything(random: Random, depth: int = 0) -> Any:
    """A value as JSON may hold it, often nearly a conversation."""
    plain = ["", "<image>", "red <image 1> ?", None, 7, 0.5, True, "user", "assistant", "image", "text", b"x"]
    if depth > 4 or random.random() < 0.4:
        return random.choice(plain)
    if random.random() < 0.4:
        return [_anything(random, depth + 1) for _ in range(random.randrange(4))]
    keys = random.sample(["role", "content", "from", "value", "type", "text", "image", "image_url", "x"], 3)
    made = {key: _anything(random, depth + 1) for key in keys}
    for key, usual in (("role", "user"), ("from", "gpt"), ("type", "text"), ("text", "red ?")):
        if key in made and random.random() < 0.8:
            made[key] = usual
    return made


def test_whatever_a_row_holds_it_is_read_or_named() -> None:
    random, read = Random(0), 0
    for _ in range(20000):
        value, images, answer = (_anything(random) for _ in range(3))
        try:
            question = read_question(value, images, "question", "images")
            read += 1
            parts = [
                part
                for message in question.prompt
                if isinstance(message["content"], list)
                for part in message["content"]
            ]
            places = sum(part["type"] == "image" for part in parts)
            assert places in (0, len(question.images))
            assert all(set(part) == {"type"} for part in parts if part["type"] == "image")
        except BadRow as error:
            assert str(error).startswith("'question' ")
        with contextlib.suppress(BadRow):
            found = read_answer(answer, "answer")
            assert found is None or isinstance(found, (str, list))
    assert read > 500
