"""Image questions from the hub or from local files, in the format that trainers and evaluation consume."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image

from ..errors import ConfigError, config_errors

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
IMAGE_TAG = "<image>"  # marks the image's place in many datasets' questions; here images precede the question


@dataclass(frozen=True)
class DataSource:
    """Where the samples are and what their columns are called.

    Attributes:
        path: a hub dataset's name, a parquet or JSONL file, or a folder of such files (or one that
            ``datasets.save_to_disk`` wrote).
        subset, split: which part of a hub dataset.
        question, answer, images: column names; ``answer`` None where there are no gold answers. An image is bytes, a
            PIL image, ``{"bytes", "path"}``, or a path relative to the file; the column holds one or a list.
        privileged_images, privileged_text: columns that only a teacher sees, if any (``vgs.data.privileged``).
        system_prompt: text of a system message before every question.
        limit: use the first so many rows.

    Raises:
        ConfigError: a ``limit`` that is no whole number above 0.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    question: str = "question"
    answer: str | None = "answer"
    images: str = "images"
    privileged_images: str | None = None
    privileged_text: str | None = None
    system_prompt: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise ConfigError(f"limit of {self.path!r} must be a whole number above 0, got {self.limit!r}.")


class Samples(torch.utils.data.Dataset):
    """Rows as ``{"prompt": chat messages, "images": [PIL.Image], "answer": str}`` and privileged columns; images are
    decoded on access.

    Args:
        rows: the dataset; ``source`` names its columns.
        source: columns and system prompt.
        root: folder that relative image paths start from.
        indices: the rows to use, in order; None uses all.

    Raises:
        ConfigError: on access, a row whose images cannot be read, or whose question is no text.
    """

    def __init__(
        self, rows: datasets.Dataset, source: DataSource, root: Path, indices: Sequence[int] | None = None
    ) -> None:
        self.rows, self.source, self.root = rows, source, root
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, number = self.source, self.indices[index]
        images, column = {}, source.images
        try:
            row = self.rows[number]
            for name in ("images", "privileged_images"):
                if (column := getattr(source, name)) is not None:
                    value = row[column]
                    items = [] if value is None else value if isinstance(value, list) else [value]
                    images[name] = [decode_image(item, self.root) for item in items]
        except Exception as error:
            raise ConfigError(f"Row {number} of {source.path}: cannot read {column!r}: {error}") from error
        question = row[source.question]
        if not isinstance(question, str):
            raise ConfigError(f"Row {number} of {source.path}: {source.question!r} is {question!r}, expected text.")
        prompt = [{"role": "user", "content": question.replace(IMAGE_TAG, "").strip()}]
        if source.system_prompt:
            prompt.insert(0, {"role": "system", "content": source.system_prompt})
        sample = {"prompt": prompt, **images}
        if source.answer is not None:
            sample["answer"] = str(row[source.answer])
        if source.privileged_text is not None:
            sample["privileged_text"] = row[source.privileged_text]
        return sample

    def select(self, positions: Sequence[int]) -> Samples:
        """The samples at the given positions."""
        return Samples(self.rows, self.source, self.root, [self.indices[position] for position in positions])


def decode_image(value: Any, root: Path) -> Image.Image:
    """An RGB image from what a dataset's column holds.

    Args:
        value: bytes of a file, a PIL image, ``{"bytes", "path"}``, or a path.
        root: where relative paths start.

    Raises:
        TypeError: ``value`` is nothing of the kind.
        OSError: the file cannot be read, or is no image.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, (bytes, bytearray)):
        value = Image.open(io.BytesIO(value))
    elif isinstance(value, str):
        value = Image.open(root / Path(value).expanduser())
    if not isinstance(value, Image.Image):
        raise TypeError(f"expected an image, bytes or a path, got {type(value).__name__}")
    return value.convert("RGB")


def _load(source: DataSource, *arguments: Any, **options: Any) -> datasets.Dataset:
    """``datasets.load_dataset``, whose errors are of any class."""
    with config_errors(f"data path {source.path!r} cannot be read", Exception):
        try:
            return datasets.load_dataset(*arguments, **options)
        except datasets.exceptions.DatasetGenerationError as error:  # its cause says what is wrong
            raise error.__cause__ or error from error


def _read(source: DataSource) -> tuple[datasets.Dataset, Path]:
    path = Path(source.path).expanduser()
    if not path.exists():
        if path.suffix in FORMATS or path.is_absolute() or source.path.startswith((".", "~")):
            raise ConfigError(f"data path {source.path!r} does not exist.")
        return _load(source, source.path, source.subset, split=source.split), Path()
    if path.is_dir() and (path / "state.json").exists():
        with config_errors(f"data path {source.path!r} cannot be read", Exception):
            return datasets.load_from_disk(str(path)), path
    files = sorted(file for file in path.iterdir() if file.suffix in FORMATS) if path.is_dir() else [path]
    kinds = {FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ConfigError(
            f"data path {source.path!r} must be a file, or a folder of files, of one format out of "
            f"{', '.join(FORMATS)}; found {', '.join(file.name for file in files) or 'none'}."
        )
    if all(file.stat().st_size == 0 for file in files):
        raise ConfigError(f"{source.path} has no rows.")
    rows = _load(source, kinds.pop(), data_files=[str(file) for file in files], split="train")
    return rows, path if path.is_dir() else path.parent


def load_samples(source: DataSource) -> Samples:
    """Open a dataset.

    Raises:
        ConfigError: a path that does not exist or cannot be read, an unknown format, no rows, or a missing column (the
            message lists those that exist).
    """
    rows, root = _read(source)
    columns = (source.question, source.answer, source.images, source.privileged_images, source.privileged_text)
    wanted = [name for name in columns if name is not None]
    for name in wanted:
        if name not in rows.column_names:
            raise ConfigError(f"{source.path} has no column {name!r}; its columns are {', '.join(rows.column_names)}.")
    rows = rows.select_columns(wanted)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if len(rows) == 0:
        raise ConfigError(f"{source.path} has no rows.")
    return Samples(rows, source, root)
