"""The sample answers of a report, with their pictures as data."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..trainers.run_folder import INSTRUMENTS
from .quantities import TOKEN_VALUES
from .runs import RunLog

#: Most bytes of a picture that is put into a page.
PICTURE_BYTES = 400_000


def collect_samples(arms: Sequence[Sequence[RunLog]]) -> dict[str, Any] | None:
    """Every question with the answers of all arms, of the first run of each that kept some.

    Args:
        arms: of ``runs.arms_of``.

    Returns:
        ``terms`` (name, title, largest absolute value) and ``questions``: text, gold answer, pictures as data URIs, and
        ``answers``: arm, step, tokens, right, and a list of values for each term. None where no run kept samples.
    """
    questions: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place, arm in enumerate(arms):
        run = next((run for run in arm if run.samples), None)
        for snapshot in run.samples if run is not None else ():
            for sample in snapshot["samples"]:
                pictures = [_picture(run.folder, image) for image in sample["images"]]
                key = (sample["question"], sample.get("answer"), tuple(pictures))
                entry = questions.setdefault(
                    key,
                    {"question": key[0], "answer": key[1], "images": pictures, "answers": []},
                )
                said = {name: sample[name] for name in ("tokens", "right")}
                entry["answers"].append({"arm": place, "step": snapshot["step"], **said, "terms": sample["terms"]})
    if not questions:
        return None
    answers = [answer for entry in questions.values() for answer in entry["answers"]]
    terms = []
    for name, title in TOKEN_VALUES.items():
        values = [abs(value) for answer in answers for value in answer["terms"].get(name, ())]
        if values:
            terms.append({"name": name, "title": title, "largest": max(values)})
    return {"terms": terms, "questions": list(questions.values())}


def _picture(folder: Path, image: str) -> str:
    """A picture as a data URI."""
    if image.startswith("data:image/png;base64,"):
        return image
    path = folder / INSTRUMENTS / Path(image).name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} must be the picture of a sample, but cannot be read ({error.strerror}).") from error
    if not content.startswith(b"\x89PNG") or len(content) > PICTURE_BYTES:
        raise ConfigError(f"{path} must be a PNG of at most {PICTURE_BYTES} bytes, got {len(content)} bytes.")
    return "data:image/png;base64," + base64.b64encode(content).decode()
