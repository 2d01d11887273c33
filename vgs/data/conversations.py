"""From what a row says to chat messages with their pictures in place, and gold answers as text.

A row asks with a text, or with chat messages: ``role``/``content`` (text, or content parts as TRL and OpenAI have
them) or ShareGPT's ``from``/``value``. Where a text says ``<image>`` (or ``<image 1>``, ``<image1>``: the picture of
that number), a picture stands; without a mark or an image part, pictures come before the first user message.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MARK = re.compile(r"<image(?: ?(\d+))?>")
LEADING_MARKS = re.compile(rf"(?:\s*{MARK.pattern})+\s*")
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation"), "tool"),
}


class BadRow(ValueError):
    """A row that cannot be used.

    Args:
        column: at fault; the message begins with it.
        says: what is wrong with it.
        message: in place of both.
    """

    def __init__(self, column: str, says: str, message: str | None = None) -> None:
        super().__init__(message or f"{column!r} {says}")
        self.column = column


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        prompt: chat messages; an image part is ``{"type": "image"}``, and ``images`` holds the pictures in order.
        images: pictures as the row holds them (paths, bytes, ...).
        reply: the assistant turn that the row ended with, if it did.
    """

    prompt: list[dict[str, Any]]
    images: list[Any]
    reply: str | None


def as_list(value: Any) -> list[Any]:
    """A column's pictures: one, a list, a list written as JSON (in a CSV cell), or none."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if value is None or value == "":
        return []
    return [item for item in value if item is not None] if isinstance(value, (list, tuple)) else [value]


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        if re.match(r'\s*\[\s*\{\s*"', value):  # chat messages written as JSON
            try:
                value = json.loads(value)
            except ValueError:
                value = value.strip()
        if isinstance(value, str):
            return [{"role": "user", "content": value.strip()}]
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, dict) for item in value):
        raise BadRow(column, f"is {_short(value)}, expected text or chat messages")
    return [_message(item, column) for item in value]


def _message(item: dict[str, Any], column: str) -> dict[str, Any]:
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(column, f"has a message of the role {role!r}, expected one of {', '.join(ROLES)}")
    rest = {k: v for k, v in item.items() if k not in ("role", "from", "content", "value") and v is not None}
    if content is None and not rest.get("tool_calls"):
        raise BadRow(column, f"has a message of the role {role!r} without content")
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise BadRow(column, f"has the content {_short(content)}, expected text or content parts")
    return {"role": ROLES[role], "content": content, **rest}


def ends_with_reply(value: Any) -> bool:
    """Whether the last message is an assistant's."""
    last = value[-1] if isinstance(value, list) and value else None
    return isinstance(last, dict) and ROLES.get(last.get("role", last.get("from"))) == "assistant"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def message_texts(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """All texts of chat messages."""
    for message in messages:
        content = message.get("content")
        for part in [content] if isinstance(content, str) else content or []:
            yield part if isinstance(part, str) else part.get("text") or ""


def _part(part: Any, column: str) -> tuple[dict[str, Any], Any]:
    """A content part and the picture that it holds, if it does."""
    if isinstance(part, str):
        return {"type": "text", "text": part}, None
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = given.get("type")
    if given.get("evidence") not in (None, True, False):
        raise BadRow(column, f"has a content part with evidence: {given['evidence']!r}, expected true or false")
    if kind in ("image", "image_url") and given.get("evidence") is False:
        raise BadRow(column, "has an image with evidence: false, but the text-only view has no images")
    if kind == "text" and isinstance(given.get("text"), str):
        return given, None
    if kind in ("image", "image_url"):
        held = next(
            (given[key] for key in ("image", "image_url", "url", "path", "base64", "bytes") if key in given), None
        )
        if isinstance(held, dict) and not any(value is not None for value in held.values()):
            held = None
        return {"type": "image"}, held
    raise BadRow(column, f"has the content part {_short(part)}, expected one of the type text or image")


def _split_marks(text: str) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Content parts of a text with marks; of each mark the number of its picture, if it has one.

    White space around marks at the beginning separates them from the text and is dropped; all other text stays.
    """
    parts: list[dict[str, Any]] = []
    numbers: list[int | None] = []
    place = 0
    if leading := LEADING_MARKS.match(text):
        for mark in MARK.finditer(leading[0]):
            parts.append({"type": "image"})
            numbers.append(int(mark[1]) if mark[1] else None)
        place = leading.end()
    for mark in MARK.finditer(text, place):
        parts += [{"type": "text", "text": text[place : mark.start()]}, {"type": "image"}]
        numbers.append(int(mark[1]) if mark[1] else None)
        place = mark.end()
    parts.append({"type": "text", "text": text[place:]})
    return [part for part in parts if part["type"] == "image" or part["text"]], numbers


@dataclass
class _Slot:
    """A place for a picture: the picture that a part holds, or the number that a mark names, or neither."""

    held: Any = None
    number: int | None = None


def _place_images(message: dict[str, Any], column: str) -> tuple[dict[str, Any], list[_Slot]]:
    content, parts, slots = message["content"], [], []
    if content is None:
        return message, []
    if isinstance(content, str):
        split, numbers = _split_marks(content)
        return {**message, "content": split if numbers else content}, [_Slot(number=number) for number in numbers]
    for given in content:
        part, held = _part(given, column)
        if part["type"] == "image":
            parts.append(part)
            slots.append(_Slot(held=held))
        else:
            split, numbers = _split_marks(part["text"])
            parts += [{**part, **piece} if piece["type"] == "text" else piece for piece in split] if numbers else [part]
            slots += [_Slot(number=number) for number in numbers]
    return {**message, "content": parts}, slots


def _reply(message: dict[str, Any], column: str) -> str:
    content = message["content"]
    if isinstance(content, (list, tuple)) and any(_part(part, column)[0]["type"] != "text" for part in content):
        raise BadRow(column, "ends with an assistant turn that holds a picture, expected text (the gold answer)")
    return "".join(message_texts([message])).strip()


def _with_evidence(
    messages: list[dict[str, Any]], texts: Sequence[str], pictures: int, place: int
) -> list[dict[str, Any]]:
    """The conversation with marked texts in one message: behind the pictures that it begins with, before the rest."""
    message = messages[place]
    parts = message["content"]
    if isinstance(parts, str):
        parts = [*[{"type": "image"}] * pictures, {"type": "text", "text": parts}]
    first = next((index for index, part in enumerate(parts) if part["type"] != "image"), len(parts))
    marked = [{"type": "text", "text": f"{text}\n\n", "evidence": True} for text in texts]
    filled = {**message, "content": [*parts[:first], *marked, *parts[first:]]}
    return [*messages[:place], filled, *messages[place + 1 :]]


def read_evidence(value: Any, column: str) -> list[str]:
    """Texts that are evidence: one, a list, a list of texts written as JSON (in a CSV cell), or none.

    A document may begin as JSON does: any other text is one text. Empty texts are left out.

    Raises:
        BadRow: something else.
    """
    texts = [value]
    if isinstance(value, (list, tuple)):
        texts = list(value)
    elif isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(value)
            texts = found if found and all(isinstance(text, str) for text in found) else texts
    texts = [text for text in texts if text is not None]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise BadRow(column, f"is {_short(wrong[0])}, expected text or a list of texts")
    return [text for text in texts if text.strip()]


def read_question(
    value: Any,
    images: Any,
    column: str,
    images_column: str | None = None,
    system_prompt: str | None = None,
    evidence: Sequence[str] = (),
) -> Question:
    """What a row asks, with every picture in its place.

    Args:
        value: text or chat messages. An assistant turn at the end is the gold answer, no part of the prompt.
        images: one picture, a list, or None, beside those that content parts hold themselves.
        column, images_column: names of both, for messages.
        system_prompt: goes before a conversation that has no system message of its own.
        evidence: texts that the text-only view lacks; they stand in the first user message, before what it asks.

    Raises:
        BadRow: no question, or marks and pictures that do not match.
    """
    messages, reply = _messages(value, column), None
    if messages[-1]["role"] == "assistant":
        reply = _reply(messages.pop(), column)
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not users:
        raise BadRow(column, "has no user message that asks anything")
    slots: list[_Slot] = []
    for index, message in enumerate(messages):
        messages[index], found = _place_images(message, column)
        slots += found
    if not any(text.strip() for text in message_texts(messages)):
        raise BadRow(column, "is empty, expected a question")
    pictures = _fill(slots, as_list(images), column, images_column)
    first = messages[users[0]]
    if pictures and not slots and not isinstance(first["content"], str):
        messages[users[0]] = {**first, "content": [{"type": "image"}] * len(pictures) + first["content"]}
    if evidence:
        messages = _with_evidence(messages, evidence, 0 if slots else len(pictures), users[0])
    if system_prompt:
        if any(message["role"] == "system" for message in messages):
            raise BadRow(column, "has a system message of its own beside system_prompt: leave one of them out")
        messages.insert(0, {"role": "system", "content": system_prompt})
    return Question(messages, pictures, reply)


def _fill(slots: Sequence[_Slot], images: list[Any], column: str, images_column: str | None) -> list[Any]:
    """The pictures in the order of their places."""
    if not slots:
        return images
    open_slots = [slot for slot in slots if slot.held is None]
    if len(open_slots) != len(images):
        places = f"{len(open_slots)} place{'s' if len(open_slots) != 1 else ''} for images"
        where = f"column {images_column!r} holds" if images_column else "the row has"
        raise BadRow(column, f"has {places} (<image> marks or image parts), but {where} {len(images)}")
    numbers = [slot.number for slot in open_slots]
    if any(number is not None for number in numbers):
        if sorted(numbers, key=lambda number: number or 0) != list(range(1, len(images) + 1)):
            named = ", ".join("<image>" if number is None else f"<image {number}>" for number in numbers)
            raise BadRow(column, f"names the images {named}, expected each of 1 to {len(images)} once")
        images = [images[number - 1] for number in numbers]
    rest = iter(images)
    return [next(rest) if slot.held is None else slot.held for slot in slots]


def _one_answer(value: Any, column: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (dict, list, tuple, bytes)):
        raise BadRow(column, f"is {_short(value)}, expected text, a number, a list of them, or null")
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers is float as soon as one of them is
    return str(value).strip() or None


def read_answer(value: Any, column: str) -> str | list[str] | None:
    """A gold answer: text; a list where any of several is right; None where null, empty text or an empty list says that
    there is none. Numbers and booleans become text.

    Raises:
        BadRow: something else.
    """
    if isinstance(value, (list, tuple)):
        found = [answer for item in value if (answer := _one_answer(item, column)) is not None]
        return found or None
    return _one_answer(value, column)
