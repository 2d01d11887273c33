"""Rows that cannot be used, found before training instead of at their step."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets.fingerprint import Hasher
from PIL import Image
from tqdm.auto import tqdm

from ..errors import ConfigError
from ..models.tokenizers import media_tokens
from .cache import processor_fingerprint, remembered
from .conversations import BadRow, as_list, message_texts
from .sources import Samples, listed

logger = logging.getLogger(__name__)

ODD_SIDE, ODD_ASPECT = 32, 20  # pictures that are smaller, or longer, are shown to the processor


@dataclasses.dataclass(frozen=True)
class Problem:
    """A row that cannot be used: its number in the data, the column at fault, and one sentence."""

    row: int
    column: str
    sentence: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.sentence}"


def _check_size(processor: Any, image: Image.Image) -> None:
    """See that a processor can prepare a picture of these sides.

    Raises:
        Exception: it cannot; the class is the processor's.
    """
    if hasattr(processor, "_get_num_multimodal_tokens"):
        processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width)])
    sides = sorted(image.size)
    if sides[0] < ODD_SIDE or sides[1] > ODD_ASPECT * sides[0]:
        processor.image_processor(images=[image], return_tensors="pt")


def _row_problem(samples: Samples, index: int, processor: Any, tokens: Sequence[str]) -> Problem | None:
    number = samples.indices[index]
    try:
        sample = samples.decoded(index)
    except BadRow as error:
        return Problem(number, error.column, str(error).rstrip("."))
    columns = samples.columns
    texts = list(message_texts(sample["prompt"]))
    if found := next((token for token in tokens if any(token in text for text in texts)), None):
        says = f"{columns.question!r} holds {found}, which the model reads as part of a picture"
        return Problem(number, columns.question, f"{says}: write <image> for a picture, or leave it out")
    for name in ("images", "privileged_images"):
        for image in sample.get(name, ()) if processor is not None else ():
            try:
                _check_size(processor, image)
            except Exception as error:
                column, size = getattr(columns, name) or columns.question, f"{image.width} x {image.height} pixels"
                says = (
                    f"{column!r} holds a picture of {size} that the processor refuses: {' '.join(str(error).split())}"
                )
                return Problem(number, column, says.rstrip("."))
    return None


def over_rows(function: Callable[[int], Any], count: int, title: str, progress: bool = True) -> list[Any]:
    """``function`` of every index, in threads (decoding and tokenizing release the interpreter lock), with a bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # A thousand at a time: results that nobody has asked for yet would keep their memory.
        results: list[Any] = []
        with tqdm(total=count, desc=title, leave=False, disable=not progress) as bar:
            for start in range(0, count, 1000):
                for result in pool.map(function, range(start, min(start + 1000, count))):
                    results.append(result)
                    bar.update()
    return results


def check_rows(
    samples: Samples, processor: Any = None, tokens: Sequence[str] | None = None, progress: bool = True
) -> list[Problem]:
    """Look at every row: questions, answers and marks, every picture decoded, and what a processor refuses.

    Args:
        samples: of ``load_samples``.
        processor: the model's, for sizes of pictures (aspect ratio) and ``tokens``; None leaves these checks out.
        tokens: texts that no prompt may contain; None takes the processor's ``media_tokens``.
        progress: show a bar.

    Returns:
        The first problem of each row that has one, in order.
    """
    if tokens is None:
        tokens = () if processor is None else media_tokens(processor)
    check = functools.partial(_row_problem, samples, processor=processor, tokens=tokens)
    return [problem for problem in over_rows(check, len(samples), "checking rows", progress) if problem is not None]


def _paths(value: Any) -> Iterator[str]:
    """All texts that may be paths of pictures, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        if value.get("bytes") is None:
            for key, item in value.items():
                if key not in ("text", "role", "type"):
                    yield from _paths(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)


def _file_states(samples: Samples) -> Iterator[tuple[str, int, int]]:
    """Path, length and time of change of the picture files that rows name."""
    names = (samples.columns.images, samples.columns.privileged_images, samples.columns.question)
    features = {name: feature for name, feature in samples.rows.features.items() if name in names}
    held = [name for name, feature in features.items() if "binary" not in str(feature)]
    if (
        samples.columns.question in held
        and samples.columns.images is not None
        and "image" not in str(features[samples.columns.question])
    ):
        held.remove(samples.columns.question)
    for row in samples.rows.select_columns(held).select(list(samples.indices)) if held else ():
        for name in held:
            for path in _paths(as_list(row[name])):
                if len(path) > 1000 or path.startswith(("http", "data:")):
                    continue
                try:
                    state = samples.folders.find(path).stat()
                except (OSError, ValueError):
                    continue
                yield path, state.st_size, state.st_mtime_ns


def data_fingerprint(samples: Samples) -> str:
    """A hash of the rows, of how they are read, and of the picture files that they name (size and time of change)."""
    source = dataclasses.replace(samples.source, on_bad_row="error")
    parts = [samples.rows._fingerprint, list(samples.indices), dataclasses.astuple(source)]
    return Hasher.hash([*parts, dataclasses.astuple(samples.columns), list(_file_states(samples))])


def bad_rows(samples: Samples, processor: Any = None, progress: bool = True) -> list[Problem]:
    """As ``check_rows``; what was found is kept on disk for these data and this processor."""
    key = data_fingerprint(samples)
    if processor is not None:
        key = Hasher.hash([key, processor_fingerprint(processor)])
    found = remembered(
        "rows", key, lambda: [dataclasses.asdict(x) for x in check_rows(samples, processor, progress=progress)]
    )
    return [Problem(**fields) for fields in found]


def good_rows(samples: Samples, processor: Any = None, progress: bool = True) -> Samples:
    """The rows that can be used: without ``bad_rows``.

    Raises:
        ConfigError: there are bad rows and the source's ``on_bad_row`` is ``"error"``, or no good ones.
    """
    problems = bad_rows(samples, processor, progress)
    if not problems:
        return samples
    path, count = samples.source.path, f"{len(problems)} of {len(samples)} rows"
    details = "; ".join(map(str, problems[:3])) + ("; ..." if len(problems) > 3 else "")
    if samples.source.on_bad_row == "error":
        raise ConfigError(f"{path}: {count} cannot be used ({details}); on_bad_row: skip leaves them out.")
    bad = {problem.row for problem in problems}
    logger.warning(
        "%s: %s cannot be used and are skipped: rows %s (%s).", path, count, listed(sorted(bad), len(bad)), details
    )
    kept = [position for position, number in enumerate(samples.indices) if number not in bad]
    if not kept:
        raise ConfigError(f"{path}: no row can be used ({details}).")
    return samples.select(kept)
