"""Image questions from the hub or from local files in the format the trainer consumes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from ..errors import ConfigError, in_one_line
from .conversations import BadRow, as_list, ends_with_reply, read_answer, read_evidence, read_question
from .formats import read_rows
from .images import Folders, decode_image, image_size

logger = logging.getLogger(__name__)

QUESTIONS = ("question", "messages", "prompt", "conversations")
IMAGES = ("images", "image")
ANSWERS = ("answer", "solution")
ON_BAD_ROW = ("error", "skip")


@dataclass(frozen=True)
class DataSource:
    """Where the samples are and what their columns are called.

    Attributes:
        path: a hub dataset's name, or a local file or folder. Files are parquet, JSONL, JSON, CSV, TSV or arrow, plain
            or compressed (``.gz``, ``.bz2``, ``.xz``); cells of CSV and TSV are text. A folder holds such files of one
            format, with splits as ``datasets`` infers them from the names of files or sub-folders; or pictures and
            ``metadata.jsonl`` (``imagefolder``); or what ``save_to_disk`` wrote.
        subset, revision: of a hub dataset; a branch, tag or commit pins it. Paths in its rows are not opened.
        split: also of a local folder. None: the only one, else ``train``.
        question: the column with the question, a text or chat messages (``role``/``content``, ShareGPT's
            ``from``/``value``). None: the one of ``QUESTIONS`` that exists.
        answer: the column with gold answers; TRL's ``solution`` is taken where the default does not exist, and a
            conversation's last assistant turn where both do not. None: there are no gold answers. A null or empty
            answer is no answer; a list holds alternatives; numbers become text.
        images: the column with one image or a list (``vgs.data.images.decode_image``); ``image`` is taken where the
            default does not exist. None: only those within chat messages.
        evidence_column: a column with a text, or a list of texts, that is evidence as pictures are: it stands before
            the question, and the text-only view lacks it. None: pictures, and what chat messages mark.
        privileged_images, privileged_text: columns that only a teacher sees, if any (``vgs.data.privileged``).
        system_prompt: text of a system message before every question.
        limit: use the first so many rows.
        responses: a column with recorded responses to each question, see ``vgs.data.recorded``; None: there are none.
        kept: further columns, which samples have under their own names.
        on_bad_row: ``"error"``, or ``"skip"`` leaves rows out that cannot be used, and lists them.

    Raises:
        ConfigError: a ``limit`` that is no whole number above 0, or an unknown ``on_bad_row``.
    """

    path: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    question: str | None = None
    answer: str | None = "answer"
    images: str | None = "images"
    privileged_images: str | None = None
    privileged_text: str | None = None
    system_prompt: str | None = None
    limit: int | None = None
    on_bad_row: str = "error"
    responses: str | None = None
    kept: tuple[str, ...] = ()
    evidence_column: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and (type(self.limit) is not int or self.limit < 1):
            raise ConfigError(f"limit of {self.path!r} must be a whole number above 0, got {self.limit!r}.")
        if self.on_bad_row not in ON_BAD_ROW:
            raise ConfigError(
                f"on_bad_row of {self.path!r} must be one of {', '.join(ON_BAD_ROW)}, got {self.on_bad_row!r}."
            )


@dataclass(frozen=True)
class Columns:
    """Names of the columns that are used; ``images`` and ``answer`` None where no column holds them."""

    question: str
    answer: str | None
    images: str | None
    privileged_images: str | None
    privileged_text: str | None
    gold_replies: bool  # the last assistant turns are the gold answers
    responses: str | None = None
    kept: tuple[str, ...] = ()
    evidence: str | None = None

    def names(self) -> list[str]:
        """The columns, each once."""
        of_questions = (self.question, self.answer, self.images, self.privileged_images, self.privileged_text)
        named = (*of_questions, self.evidence, self.responses, *self.kept)
        return list(dict.fromkeys(name for name in named if name is not None))


class Samples(torch.utils.data.Dataset):
    """Rows as ``{"prompt": chat messages, "images": [PIL.Image], "answer": str | list[str] | None}`` and privileged
    columns; images are decoded on access.

    A message's ``content`` is text, or content parts where pictures stand within it; the k-th part of the type image
    belongs to the k-th of ``images``. ``answer`` is missing where the source has no gold answers.

    Args:
        rows: the dataset, with undecoded image features.
        source: what it was read from; holds the system prompt.
        columns: its columns.
        folders: where paths in rows may lead.
        indices: the rows to use, in order; None uses all.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        source: DataSource,
        columns: Columns,
        folders: Folders,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.rows, self.source, self.columns, self.folders = rows, source, columns, folders
        self.indices = range(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def undecoded(self, index: int) -> dict[str, Any]:
        """The sample with ``images`` and ``privileged_images`` as the row holds them.

        Raises:
            BadRow: the row cannot be used.
        """
        columns = self.columns
        row = self.rows[self.indices[index]]
        question = read_question(
            row[columns.question],
            None if columns.images is None else row[columns.images],
            columns.question,
            columns.images,
            self.source.system_prompt,
            () if columns.evidence is None else read_evidence(row[columns.evidence], columns.evidence),
        )
        sample: dict[str, Any] = {"prompt": question.prompt, "images": question.images}
        if columns.privileged_images is not None:
            sample["privileged_images"] = as_list(row[columns.privileged_images])
        if columns.answer is not None:
            sample["answer"] = read_answer(row[columns.answer], columns.answer)
        elif columns.gold_replies:
            sample["answer"] = question.reply or None
        if columns.privileged_text is not None:
            sample["privileged_text"] = row[columns.privileged_text]
        if columns.responses is not None:
            sample["responses"] = row[columns.responses]
        return {**{name: row[name] for name in columns.kept}, **sample}

    def column(self, name: str) -> list[Any] | None:
        """The values of one of the kept columns, or of ``"responses"``, in the samples' order; None without it."""
        column = self.columns.responses if name == "responses" else name if name in self.columns.kept else None
        if column is None:
            return None
        values = self.rows[column]
        return [values[index] for index in self.indices]

    def _pictures(self, sample: dict[str, Any], read: Any) -> dict[str, Any]:
        for name in ("images", "privileged_images"):
            try:
                if name in sample:
                    sample[name] = [read(value, self.folders) for value in sample[name]]
            except Exception as error:
                column = getattr(self.columns, name) or self.columns.question
                says = in_one_line(error)
                raise BadRow(column, says, f"cannot read {column!r}: {says}") from error
        return sample

    def decoded(self, index: int) -> dict[str, Any]:
        """The sample.

        Raises:
            BadRow: the row cannot be used.
        """
        return self._pictures(self.undecoded(index), decode_image)

    def measured(self, index: int) -> dict[str, Any]:
        """The sample with (width, height) in place of each image, from its header.

        Raises:
            BadRow: the row cannot be used.
        """
        return self._pictures(self.undecoded(index), image_size)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self.decoded(index)
        except BadRow as error:
            raise ConfigError(self.describe(index, str(error).rstrip("."))) from error

    def describe(self, index: int, sentence: str) -> str:
        """A sentence that names the row of a sample."""
        return f"Row {self.indices[index]} of {self.source.path}: {sentence}."

    def select(self, positions: Sequence[int]) -> Samples:
        """The samples at the given positions."""
        chosen = [self.indices[position] for position in positions]
        return Samples(self.rows, self.source, self.columns, self.folders, chosen)


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def find_columns(source: DataSource, features: datasets.Features) -> Columns:
    """Which columns are used.

    Raises:
        ConfigError: one is missing (the message lists those that exist), or several could be the question.
    """
    names = list(features)

    def need(name: str, hint: str = "") -> str:
        if name not in names:
            raise ConfigError(f"{source.path} has no column {name!r}; its columns are {', '.join(names)}{hint}.")
        return name

    asking = [name for name in QUESTIONS if name in names]
    if source.question is None and len(asking) > 1:
        raise ConfigError(
            f"{source.path} has the columns {', '.join(asking)}: say with the key 'question' which one to use."
        )
    question = need(
        source.question or (asking or QUESTIONS)[0],
        " (the key 'question' names the column with questions or chat messages)",
    )
    # A column of mixed values may hold texts or messages.
    chat, text = not _is_text(features[question]), _is_text(features[question])
    answer, images = source.answer, source.images
    if answer == ANSWERS[0] and answer not in names:
        answer = next((name for name in ANSWERS if name in names), None)
        if answer is None and text:
            need(ANSWERS[0], " (the key 'answer' names the column with gold answers; null: there are none)")
    if images == IMAGES[0] and images not in names:
        images = next((name for name in IMAGES if name in names), None)
        if images is None and text and source.evidence_column is None:
            need(IMAGES[0], " (the key 'images' names the column with images; null: there are none)")
    privileged = (source.privileged_images, source.privileged_text)
    for name in (answer, images, *privileged, source.evidence_column, source.responses, *source.kept):
        if name is not None:
            need(name)
    return Columns(
        question,
        answer,
        images,
        source.privileged_images,
        source.privileged_text,
        gold_replies=chat and answer is None and source.answer is not None,
        responses=source.responses,
        kept=source.kept,
        evidence=source.evidence_column,
    )


def listed(numbers: Sequence[int], count: int = 5) -> str:
    """The first few row numbers, for a message."""
    return ", ".join(map(str, numbers[:count])) + (", ..." if len(numbers) > count else "")


def _say(source: DataSource, column: str, total: int, found: Sequence[int], what: str) -> None:
    if found:
        logger.warning(
            "%s: %s in %d of %d rows %s (rows %s).", source.path, column, len(found), total, what, listed(found)
        )


def _is_empty(value: Any, column: str) -> bool:
    """Whether a cell of the column of evidence holds none."""
    try:
        return not read_evidence(value, column)
    except BadRow:
        return False  # found by ``check_rows``


def _say_answers(source: DataSource, column: str, answers: Iterable[Any]) -> None:
    """One line for each way in which gold answers are not taken as they stand."""
    empty, numbers, lists, total = [], [], [], 0
    for index, value in enumerate(answers):
        total += 1
        try:
            answer = read_answer(value, column)
        except BadRow:
            continue  # found by ``check_rows``
        if answer is None:
            empty.append(index)
        elif isinstance(answer, list):
            lists.append(index)
        elif not isinstance(value, str):
            numbers.append(index)
    _say(source, column, total, empty, "is null or empty: no gold answer, so no accuracy and no reward for it")
    _say(source, column, total, numbers, "is a number, a boolean or a time: taken as text")
    _say(source, column, total, lists, "is a list: each of its answers is right")


def open_samples(source: DataSource) -> Samples:
    """Open a dataset, with all its rows: nobody has looked whether each can be used.

    Args:
        source: where it is, and what its columns are called.

    Raises:
        DataNotFound (a ConfigError and a FileNotFoundError): a local path that does not exist.
        ConfigError: files of no or several formats, a missing split or column (the message lists those that exist), or
            no rows.
    """
    rows, folders = read_rows(source.path, source.subset, source.split, source.revision)
    columns = find_columns(source, rows.features)
    rows = rows.select_columns(columns.names())
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if len(rows) == 0:
        raise ConfigError(f"{source.path} has no rows.")
    if columns.evidence is not None:
        empty = [index for index, value in enumerate(rows[columns.evidence]) if _is_empty(value, columns.evidence)]
        what = "is null or empty: without pictures such a row has nothing to steer by, and is distilled plainly"
        _say(source, columns.evidence, len(rows), empty, what)
    if columns.answer is not None:
        _say_answers(source, columns.answer, rows[columns.answer])
    elif columns.gold_replies:
        logger.info("%s: the last assistant turns of %s are the gold answers.", source.path, columns.question)
        if "binary" not in str(rows.features[columns.question]):  # else all pictures would be read for it
            values = enumerate(rows[columns.question])
            without = [i for i, value in values if not ends_with_reply(value)]
            _say(source, columns.question, len(rows), without, "does not end with an assistant turn: no gold answer")
    return Samples(rows, source, columns, folders)


def load_samples(source: DataSource) -> Samples:
    """Open a dataset; with ``on_bad_row="skip"`` without the rows that cannot be used.

    Args:
        source: where it is, and what its columns are called.

    Raises:
        ConfigError: as ``open_samples``, or no row can be used.
    """
    samples = open_samples(source)
    if source.on_bad_row == "skip":
        from .checks import good_rows  # which reads samples

        return good_rows(samples)
    return samples
