"""Image questions from the hub or from local files in the format the trainer consumes, and the default answer check."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from tqdm.auto import tqdm
from trl.data_utils import prepare_multimodal_messages

from .pairing import encode_prompts

logger = logging.getLogger(__name__)

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
MARKUP = r"\\(?:text|mathrm|mathbf)\{([^{}]*)\}"  # LaTeX around an answer
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
        privileged_images, privileged_text: columns that only a teacher sees (``vgs.privileged``), if there are any.
        system_prompt: text of a system message before every question.
        limit: use the first so many rows.
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


class Samples(torch.utils.data.Dataset):
    """Rows as ``{"prompt": chat messages, "images": [PIL.Image], "answer": str}`` and privileged columns; images are
    decoded on access.

    Args:
        rows: the dataset; ``source`` names its columns.
        source: columns and system prompt.
        root: folder that relative image paths start from.
        indices: the rows to use, in order; None uses all.
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
            raise ValueError(f"Row {number} of {source.path}: cannot read {column!r}: {error}") from error
        question = row[source.question]
        if not isinstance(question, str):
            raise ValueError(f"Row {number} of {source.path}: {source.question!r} is {question!r}, expected text.")
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
    """An RGB image from bytes, a PIL image, ``{"bytes", "path"}`` or a path (relative ones start at ``root``)."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, (bytes, bytearray)):
        value = Image.open(io.BytesIO(value))
    elif isinstance(value, str):
        value = Image.open(root / Path(value).expanduser())
    if not isinstance(value, Image.Image):
        raise TypeError(f"expected an image, bytes or a path, got {type(value).__name__}")
    return value.convert("RGB")


def _read(source: DataSource) -> tuple[datasets.Dataset, Path]:
    path = Path(source.path).expanduser()
    if not path.exists():
        if path.suffix in FORMATS or path.is_absolute() or source.path.startswith((".", "~")):
            raise FileNotFoundError(f"data path {source.path!r} does not exist.")
        return datasets.load_dataset(source.path, source.subset, split=source.split), Path()
    if path.is_dir() and (path / "state.json").exists():
        return datasets.load_from_disk(str(path)), path
    files = sorted(file for file in path.iterdir() if file.suffix in FORMATS) if path.is_dir() else [path]
    kinds = {FORMATS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"data path {source.path!r} must be a file, or a folder of files, of one format out of "
            f"{', '.join(FORMATS)}; found {', '.join(file.name for file in files) or 'none'}."
        )
    rows = datasets.load_dataset(kinds.pop(), data_files=[str(file) for file in files], split="train")
    return rows, path if path.is_dir() else path.parent


def load_samples(source: DataSource) -> Samples:
    """Open a dataset.

    Raises:
        FileNotFoundError: a local path that does not exist.
        ValueError: an unknown format, no rows, or a missing column (the message lists those that exist).
    """
    rows, root = _read(source)
    columns = (source.question, source.answer, source.images, source.privileged_images, source.privileged_text)
    wanted = [name for name in columns if name is not None]
    for name in wanted:
        if name not in rows.column_names:
            raise ValueError(f"{source.path} has no column {name!r}; its columns are {', '.join(rows.column_names)}.")
    rows = rows.select_columns(wanted)
    if source.limit is not None:
        rows = rows.select(range(min(source.limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{source.path} has no rows.")
    return Samples(rows, source, root)


def prompt_length(processor: Any, sample: dict[str, Any], **template_options: Any) -> int:
    """Tokens of a sample's prompt, image tokens included."""
    images = processor.image_processor
    if hasattr(images, "get_number_of_image_patches"):  # Qwen-VL: no need to prepare the pixels
        messages = prepare_multimodal_messages(sample["prompt"], images=sample["images"])
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_options)
        patches = [images.get_number_of_image_patches(image.height, image.width, {}) for image in sample["images"]]
        placeholders = sum(count // images.merge_size**2 - 1 for count in patches)
        return len(processor.tokenizer(text)["input_ids"]) + placeholders
    return encode_prompts(processor, [sample], **template_options)[0].shape[1]


def drop_long_prompts(samples: Samples, processor: Any, limit: int, **template_options: Any) -> Samples:
    """Samples whose prompt has at most ``limit`` tokens; the number of dropped ones is logged.

    Raises:
        ValueError: none is left.
    """
    with ThreadPoolExecutor() as pool:  # decoding images releases the interpreter lock
        lengths = pool.map(lambda i: prompt_length(processor, samples[i], **template_options), range(len(samples)))
        lengths = list(tqdm(lengths, total=len(samples), desc="prompt lengths", leave=False))
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    logger.warning("%d of %d prompts are longer than %d tokens: dropped", len(samples) - len(kept), len(samples), limit)
    if not kept:
        raise ValueError(f"No prompt of {samples.source.path} has at most max_prompt_length={limit} tokens.")
    return samples.select(kept)


def last_boxed(text: str) -> str | None:
    """What the last ``\\boxed{}`` of a text holds; None without one that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin + 1 : position]
    return None  # cut off before the closing brace


def final_answer(text: str) -> str:
    """The answer a response commits to: its last ``\\boxed{}``, else its last ``<answer>``, else what follows the
    reasoning block, else all of it."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    return (tagged[-1] if tagged else re.split(r"</(?:reason|think)>", text)[-1]).strip()


def _normalise(answer: str) -> str:
    answer = re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer).replace("$", "").replace("\\%", "%")
    return re.sub(r"\s+", " ", answer).strip().rstrip(".").strip().casefold()


def _choice(answer: str) -> str | None:
    """The letter of a multiple-choice answer such as ``B``, ``(B)``, ``B. 42`` or ``the answer is B``."""
    letter = r"\(([A-J])\)|([A-J])"
    match = re.match(r"\s*(?:\(([A-J])\)|([A-J])(?:[.):]|\s*$))", answer)
    match = match or re.search(rf"\b(?:[Aa]nswer|[Oo]ption|[Cc]hoice)(?:\s+is)?\s*:?\s*(?:{letter}\b)", answer)
    return next(filter(None, match.groups())) if match else None


def _committed(text: str) -> str:
    return re.sub(MARKUP, r"\1", final_answer(text))


def choice_letter(text: str) -> str | None:
    """The letter of the multiple-choice answer that a response (or a gold answer) commits to, if it does."""
    return _choice(_committed(text))


def answers_match(response: str, gold: str) -> bool:
    """Whether a response's final answer is the gold answer: the same choice letter, number, or normalised text."""
    given, gold = _committed(response), _committed(gold)
    if re.fullmatch(r"\(?[A-J]\)?\.?", gold):
        return _choice(given) == _choice(gold.rstrip("."))
    given, gold = _normalise(given), _normalise(gold)
    try:
        return float(given.rstrip("%")) == float(gold.rstrip("%")) and given.endswith("%") == gold.endswith("%")
    except ValueError:
        return given == gold
