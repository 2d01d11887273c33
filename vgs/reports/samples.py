"""The sample answers of a report, with their pictures as data."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..trainers.run_folder import INSTRUMENTS
from .quantities import TOKEN_VALUES
from .runs import RunLog

URI = "data:image/png;base64,"
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
#: Most bytes of a picture that is put into a page.
PICTURE_BYTES = 400_000


def collect_samples(arms: Sequence[Sequence[RunLog]]) -> dict[str, Any] | None:
    """Every question with the answers of all arms, of the first run of each that kept some.

    Args:
        arms: of ``runs.arms_of``.

    Returns:
        ``terms`` (name, title, largest absolute value) and ``questions``: text, gold answer, pictures as data URIs, and
        ``answers``: arm, step, tokens, right, and a list of values for each term that ``TOKEN_VALUES`` names, None
        where one was not finite. None where no run kept samples.

    Raises:
        ConfigError: a picture that is no PNG, or cannot be read.
    """
    questions: dict[str, dict[str, Any]] = {}
    for place, arm in enumerate(arms):
        run = next((run for run in arm if run.samples), None)
        for snapshot in run.samples if run is not None else ():
            for sample in snapshot["samples"]:
                pictures = [_picture(run.folder, image) for image in sample["images"]]
                gold = sample.get("answer")
                if isinstance(gold, list):  # alternatives
                    gold = " or ".join(map(str, gold))
                asked = {"question": sample["question"], "answer": gold, "images": pictures}
                entry = questions.setdefault(json.dumps(asked), {**asked, "answers": []})
                said = {name: sample[name] for name in ("tokens", "right")}
                terms = {name: column for name, column in sample["terms"].items() if name in TOKEN_VALUES}
                entry["answers"].append({"arm": place, "step": snapshot["step"], **said, "terms": terms})
    if not questions:
        return None
    answers = [answer for entry in questions.values() for answer in entry["answers"]]
    terms = []
    for name, title in TOKEN_VALUES.items():
        columns = [answer["terms"].get(name, ()) for answer in answers]
        values = [abs(value) for column in columns for value in column if value is not None]
        if values:
            terms.append({"name": name, "title": title, "largest": max(values)})
    return {"terms": terms, "questions": list(questions.values())}


def _picture(folder: Path, image: str) -> str:
    """A picture as a data URI, from one or from its file.

    Raises:
        ConfigError: it is no PNG, or cannot be read.
    """
    if image.startswith(URI):
        if not BASE64.fullmatch(image, len(URI)):
            raise ConfigError(f"{folder} has a sample whose picture must be a PNG in base64, got {image[:60]!r}.")
        return image
    path = folder / INSTRUMENTS / Path(image).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} must be the picture of a sample, but cannot be read ({error.strerror}).") from error
    if not content.startswith(b"\x89PNG") or len(content) > PICTURE_BYTES:
        raise ConfigError(f"{path} must be a PNG of at most {PICTURE_BYTES} bytes, got {len(content)} bytes.")
    return URI + base64.b64encode(content).decode()
