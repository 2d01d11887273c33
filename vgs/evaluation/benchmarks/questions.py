"""How a row of each benchmark is asked: lmms-eval's ``doc_to_messages``, ``doc_to_text`` and ``doc_to_visual``.

A question is the row's own text, its options by letter, and at most one line that says in what form to answer. Pictures
stand where the text has their mark (``<image 1>``), else before it. The system message is that of the run, from the
file that the environment variable ``VGS_EVAL_SETTINGS`` names; without one there is none.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS_VARIABLE = "VGS_EVAL_SETTINGS"
LETTER = "Answer with the letter of the right option."
LETTERS = "Answer with the letter of the right option, or the letters if several are right."
IN_THE_PICTURE = "Answer the question in the image."
MARK = re.compile(r"<image ?(\d+)>")
Row = Mapping[str, Any]


@functools.cache
def eval_settings() -> Mapping[str, Any]:
    """What ``vgs eval`` has written down for this evaluation; empty where lmms-eval was started by hand."""
    path = os.environ.get(SETTINGS_VARIABLE)
    return json.loads(Path(path).read_text())["settings"] if path else {}


def lettered(options: Sequence[str], form: str = "{letter}. {option}") -> str:
    """Options, a line each, by letter."""
    return "\n".join(form.format(letter=chr(ord("A") + i), option=option) for i, option in enumerate(options))


def mmmu_pro_options(doc: Row) -> list[str]:
    """Texts of the options; the dataset keeps them as the text of a Python list."""
    options = doc["options"]
    return [str(x) for x in (ast.literal_eval(options) if isinstance(options, str) else options)]


def mathverse_options(doc: Row) -> list[str]:
    """Texts of the options, as they follow ``Choices:`` in the full question; empty for a free answer."""
    if doc["question_type"] != "multi-choice":
        return []
    _, _, listed = (doc.get("question_for_eval") or doc["question"]).rpartition("Choices:")
    found = re.findall(r"^\s*([A-J])\s*[:.]\s*(.*?)\s*$", listed, flags=re.MULTILINE)
    letters = [letter for letter, _ in found]
    return [text for _, text in found] if letters == [chr(ord("A") + i) for i in range(len(found))] else []


def mathvision_options(doc: Row) -> list[str]:
    """Texts of the options; empty where they are letters alone (the options are in the picture) or there are none."""
    options = [str(x) for x in doc["options"] or ()]
    return [] if options == [chr(ord("A") + i) for i in range(len(options))] else options


def mmmu_pro_text(doc: Row, specific: Any = None) -> str:
    return f"{doc['question']}\n\n{lettered(mmmu_pro_options(doc))}\n\n{LETTER}"


def logicvista_text(doc: Row, specific: Any = None) -> str:
    return f"{doc['question']}\n\n{LETTERS}"


def mathverse_text(doc: Row, specific: Any = None) -> str:
    question = doc["question"].strip() or IN_THE_PICTURE
    return f"{question}\n\n{LETTER}" if doc["question_type"] == "multi-choice" else question


def visualpuzzles_text(doc: Row, specific: Any = None) -> str:
    options = doc["options"]
    listed = lettered(options, "({letter}) {option}") if options else "The options (A), (B), (C), (D) are in the image."
    return f"{doc['question'].strip()}\n\n{listed}\n\n{LETTER}"


def mathvision_text(doc: Row, specific: Any = None) -> str:
    options = mathvision_options(doc)
    parts = [doc["question"].strip(), *([lettered(options)] if options else []), *([LETTER] if doc["options"] else [])]
    return "\n\n".join(parts)


def vlmsareblind_text(doc: Row, specific: Any = None) -> str:
    return doc["prompt"]


def _picture(image: Any) -> Any:
    from ...data.images import to_rgb

    return to_rgb(image)


def mmmu_pro_pictures(doc: Row) -> list[Any]:
    """``image_1`` to ``image_7``: those that the row has."""
    return [_picture(doc[name]) for name in (f"image_{i}" for i in range(1, 8)) if doc.get(name) is not None]


def one_picture(doc: Row) -> list[Any]:
    return [_picture(doc["image"])]


def mathvision_pictures(doc: Row) -> list[Any]:
    return [_picture(doc["decoded_image"])]


def content(text: str, pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """Text and pictures as content blocks of lmms-eval's protocol.

    Args:
        text: with marks ``<image 1>`` (or ``<image1>``) where pictures stand. The first mark of a picture is its place,
            later ones become the words "image 1"; marks without a picture fall away.
        pictures: in the order of their numbers; those without a mark come first.
    """
    text = text.replace("\r\n", "\n")
    marked = {int(number) for number in MARK.findall(text)} & set(range(1, len(pictures) + 1))
    blocks = [{"type": "image", "url": picture} for i, picture in enumerate(pictures, 1) if i not in marked]
    placed: set[int] = set()
    written = ""
    for index, part in enumerate(MARK.split(text)):
        number = int(part) if index % 2 else 0
        if not index % 2:
            written += part
        elif number in placed:
            written += f"image {number}"
        elif number in marked:
            placed.add(number)
            blocks += [{"type": "text", "text": written}] if written.strip() else []
            blocks.append({"type": "image", "url": pictures[number - 1]})
            written = ""
    written = written.rstrip() if any(block["type"] == "text" for block in blocks) else written.strip()
    return blocks + ([{"type": "text", "text": written}] if written else [])


def messages(text: str, pictures: Sequence[Any]) -> list[dict[str, Any]]:
    """A question as chat messages of lmms-eval's protocol, after the run's system message if it has one."""
    system = eval_settings().get("system_prompt")
    opening = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*opening, {"role": "user", "content": content(text, pictures)}]


def _asked(text_of: Callable[[Row], str], pictures_of: Callable[[Row], list[Any]]) -> Callable[[Row], list[Any]]:
    def doc_to_messages(doc: Row) -> list[dict[str, Any]]:
        return messages(text_of(doc), pictures_of(doc))

    return doc_to_messages


mmmu_pro_messages = _asked(mmmu_pro_text, mmmu_pro_pictures)
logicvista_messages = _asked(logicvista_text, one_picture)
mathverse_messages = _asked(mathverse_text, one_picture)
visualpuzzles_messages = _asked(visualpuzzles_text, one_picture)
mathvision_messages = _asked(mathvision_text, mathvision_pictures)
vlmsareblind_messages = _asked(vlmsareblind_text, one_picture)
