"""Rows in the form of the paper's seven datasets, with real pictures, and responses with what they are worth.

``write_datasets`` lays them out as the hub does, so that ``load_dataset("MMMU/MMMU_Pro", ...)`` in that folder reads
them. Fields are those of the datasets' cards, of LogicVista those that lmms-eval reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Recorded:
    """A row, and responses to it.

    Attributes:
        row: of the dataset; colours stand for pictures.
        asked: the text of the question that the model gets, pictures as ``[colour]``.
        right, wrong: responses.
    """

    row: Mapping[str, Any]
    asked: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


LETTER = "Answer with the letter of the right option."
LETTERS = "Answer with the letter of the right option, or the letters if several are right."


def picture(colour: str) -> Image.Image:
    """A small picture; "clear" has an alpha channel, "palette" a palette."""
    if colour == "clear":
        return Image.new("RGBA", (40, 32), (200, 30, 30, 128))
    if colour == "palette":
        return Image.new("RGB", (36, 28), "green").convert("P")
    return Image.new("RGB", (32, 48), colour)


def mmmu(number: int, question: str, options: list[str], answer: str, *colours: str) -> dict[str, Any]:
    images = {f"image_{i}": colours[i - 1] if i <= len(colours) else None for i in range(1, 8)}
    row = {"id": f"test_Math_{number}", "question": question, "options": str(options), "explanation": "?", **images}
    return {**row, "img_type": "['Diagrams']", "answer": answer, "topic_difficulty": "Easy", "subject": "Math"}


def verse(number: int, version: str, question: str, full: str, answer: str, kind: str) -> dict[str, Any]:
    row = {"sample_index": str(number), "problem_index": str(number), "problem_version": version}
    metadata = {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"}
    texts = {"query_wo": f"Please directly answer. {question}", "query_cot": f"First reason. {question}"}
    row |= {"question": question, "image": "white", "answer": answer, "question_type": kind, "metadata": metadata}
    return {**row, **texts, "question_for_eval": full}


def puzzle(number: int, question: str, options: list[str] | None, answer: str) -> dict[str, Any]:
    row = {"id": number, "category": "spatial", "image": "palette", "question": question}
    return {**row, "options": options, "answer": answer}


def vision(number: int, question: str, options: list[str], answer: str) -> dict[str, Any]:
    row = {"id": str(number), "question": question, "options": options, "image": f"images/{number}.jpg"}
    row |= {"decoded_image": "blue", "answer": answer, "solution": None, "level": 2}
    return {**row, "subject": "arithmetic"}


def blind(task: str, prompt: str, answer: str) -> dict[str, Any]:
    return {"task": task, "image": "clear", "prompt": prompt, "groundtruth": answer, "metadata": "{}"}


CHOICES = "As shown, angle A is 40°. How large is B?\nChoices:\nA:40°\nB:50°\nC:60°\nD:90°"
GRID = "Count the rows and columns. For example, rows={5} columns={6}"

#: Benchmark -> its rows.
RECORDED: dict[str, tuple[Recorded, ...]] = {
    "mmmu_pro_4": (
        Recorded(
            mmmu(1, "In <image 1> and <image 2>, how many?", ["1", "2", "$\\frac{1}{2}$", "4"], "C", "red", "clear"),
            f"In [red] and [clear], how many?\n\nA. 1\nB. 2\nC. $\\frac{{1}}{{2}}$\nD. 4\n\n{LETTER}",
            (
                r"<reason>A, no.</reason> \boxed{C}",
                "Answer: (C)",
                r"\boxed{0.5}",
                r"\boxed{\frac12}",
                "C",
                r"\boxed{\text{C}}",
            ),
            (r"\boxed{B}", r"\boxed{2}", "<reason>C it is, let me che", ""),
        ),
        Recorded(
            mmmu(
                2, "Which is <image 1>?", ["<image 2>", "a cat", "none", "the first of <image 1>"], "B", "red", "blue"
            ),
            f"Which is [red]?\n\nA. [blue]\nB. a cat\nC. none\nD. the first of image 1\n\n{LETTER}",
            (r"\boxed{a cat}", r"\boxed{B. a cat}", "The answer is B."),
            (r"\boxed{A}", r"\boxed{none}", "A cat would say A"),
        ),
    ),
    "logicvista": (
        Recorded(
            {"question": "Which comes next? A, B, C or D", "answer": "D", "image": "red"},
            f"[red]Which comes next? A, B, C or D\n\n{LETTERS}",
            (r"\boxed{D}", "<answer>D</answer>", r"<reason>\boxed{A} looked right</reason> \boxed{d}"),
            (r"\boxed{A}", "D or A, hard to say"),
        ),
        Recorded(
            {"question": "Which are true?", "answer": "A, C", "image": "blue"},
            f"[blue]Which are true?\n\n{LETTERS}",
            (r"\boxed{A, C}", r"\boxed{C and A}", r"\boxed{AC}"),
            (r"\boxed{A}", r"\boxed{A, B, C}"),
        ),
    ),
    "mathverse_vision_dominant": (
        Recorded(
            verse(1, "Vision Dominant", CHOICES, CHOICES, "B", "multi-choice"),
            f"[white]{CHOICES}\n\n{LETTER}",
            (r"\boxed{B}", r"\boxed{50^\circ}", r"\boxed{50°}", r"\boxed{B: 50°}", r"\boxed{50}"),
            (r"\boxed{A}", r"\boxed{40}", r"\boxed{60^\circ}"),
        ),
        Recorded(
            verse(2, "Vision Dominant", "How long is AB?", "How long is AB?", "2√{3}", "free-form"),
            "[white]How long is AB?",
            (r"\boxed{2\sqrt{3}}", r"\boxed{\sqrt{12}}", r"$\boxed{2√3}$"),
            (r"\boxed{2\sqrt{2}}", r"\boxed{3}", "2"),
        ),
    ),
    "mathverse_vision_only": (
        Recorded(
            verse(1, "Vision Only", "", CHOICES, "B", "multi-choice"),
            f"[white]Answer the question in the image.\n\n{LETTER}",
            (r"\boxed{B}", r"\boxed{50}"),
            (r"\boxed{C}", r"\boxed{90}"),
        ),
        Recorded(
            verse(2, "Vision Only", "", "How large is angle A?", "36°", "free-form"),
            "[white]Answer the question in the image.",
            (r"\boxed{36}", r"\boxed{36^{\circ}}", "The answer is 36."),
            (r"\boxed{63}",),
        ),
    ),
    "visualpuzzles": (
        Recorded(
            puzzle(1, " Which cube can be folded? ", None, "A"),
            f"[palette]Which cube can be folded?\n\nThe options (A), (B), (C), (D) are in the image.\n\n{LETTER}",
            (r"\boxed{A}", "Answer: A", "**Answer: (A)**"),
            (r"\boxed{D}", "no idea"),
        ),
        Recorded(
            puzzle(2, "How many?", ["3", "5", "7", "9"], "D"),
            f"[palette]How many?\n\n(A) 3\n(B) 5\n(C) 7\n(D) 9\n\n{LETTER}",
            (r"\boxed{9}", r"\boxed{(D)}"),
            (r"\boxed{3}", r"\boxed{4}"),
        ),
    ),
    "mathvision": (
        Recorded(
            vision(1, "What fraction is grey?\n<image1>", ["$\\frac{1}{4}$", "$\\frac{1}{3}$"], "B"),
            f"What fraction is grey?\n[blue]\n\nA. $\\frac{{1}}{{4}}$\nB. $\\frac{{1}}{{3}}$\n\n{LETTER}",
            (r"\boxed{B}", r"\boxed{\frac{1}{3}}", r"\boxed{1/3}"),
            (r"\boxed{A}", r"\boxed{\frac{1}{4}}"),
        ),
        Recorded(
            vision(2, "Which one?\n<image1>", ["A", "B", "C", "D", "E"], "E"),
            f"Which one?\n[blue]\n\n{LETTER}",
            (r"\boxed{E}", "The answer is (E)."),
            (r"\boxed{D}",),
        ),
        Recorded(
            vision(3, "<image1>\nHow many balls?", [], "1024"),
            "[blue]How many balls?",
            (r"\boxed{1,024}", r"\boxed{2^{10}}", r"\boxed{1024.0}"),
            (r"\boxed{1023}", r"\boxed{102}"),
        ),
    ),
    "vlmsareblind": (
        Recorded(
            blind("Counting Grid - Blank Grids", GRID, "5,6"),
            f"[clear]{GRID}",
            ("rows={5} columns={6}", r"\boxed{5, 6}", "6 columns and 5 rows", r"\boxed{\{5\}\{6\}}", "{5}{6}"),
            ("rows={6} columns={5}", "{5}", r"\boxed{6,5}"),
        ),
        Recorded(
            blind("Touching Circles", "Are the two circles touching? Answer with Yes/No.", "Yes"),
            "[clear]Are the two circles touching? Answer with Yes/No.",
            ("Yes", "Yes, they are.", r"\boxed{\text{Yes}}", "<reason>no gap</reason> {Yes}"),
            ("No", "yes or no", ""),
        ),
        Recorded(
            blind("Subway Connections", "How many paths? Answer in curly brackets, e.g., {3}.", "2"),
            "[clear]How many paths? Answer in curly brackets, e.g., {3}.",
            ("{2}", r"\boxed{2}", "Paths: {1}, no, {2}"),
            ("{3}", "12"),
        ),
        Recorded(
            blind("Circled Letter", "Which letter is circled, e.g., {a}?", "o"),
            "[clear]Which letter is circled, e.g., {a}?",
            ("{o}", r"\boxed{O}", '"o"'),
            ("{a}", "0"),
        ),
    ),
}

#: Benchmark -> (folder as on the hub, configuration, split).
PLACES = {
    "mmmu_pro_4": ("MMMU/MMMU_Pro", "standard (4 options)", "test"),
    "logicvista": ("lscpku/LogicVista", "default", "test"),
    "mathverse_vision_dominant": ("CaraJ/MathVerse-lmmseval", "testmini_version_split", "vision_dominant"),
    "mathverse_vision_only": ("CaraJ/MathVerse-lmmseval", "testmini_version_split", "vision_only"),
    "visualpuzzles": ("neulab/VisualPuzzles", "default", "train"),
    "mathvision": ("MathLLMs/MathVision", "default", "test"),
    "vlmsareblind": ("XAI/vlmsareblind", "default", "valid"),
}


def is_picture(column: str) -> bool:
    """Whether a column of one of the datasets has pictures, but for MathVision's ``image``, a path."""
    return column in ("image", "decoded_image") or (column.startswith("image_") and column[6:].isdigit())


def with_pictures(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with pictures in place of colours."""
    paths = "decoded_image" in row
    return {
        name: picture(value) if is_picture(name) and value is not None and not (paths and name == "image") else value
        for name, value in row.items()
    }


def write_datasets(folder: Path) -> None:
    """The seven datasets as parquet files below a folder, with cards that name configurations and splits."""
    import datasets

    cards: dict[str, dict[str, list[str]]] = {}
    for name, (place, config, split) in PLACES.items():
        rows = [with_pictures(item.row) for item in RECORDED[name]]
        features = datasets.Dataset.from_list(rows).features
        for column in rows[0]:  # a column whose first rows are empty is one of pictures all the same
            if is_picture(column) and not (column == "image" and "decoded_image" in rows[0]):
                features[column] = datasets.Image()
        target = folder / place
        target.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows, features=features).to_parquet(target / f"{split}.parquet")
        cards.setdefault(place, {}).setdefault(config, []).append(f"  - split: {split}\n    path: {split}.parquet\n")
    for place, configs in cards.items():
        listed = "".join(
            f"- config_name: {config}\n  data_files:\n{''.join(files)}" for config, files in configs.items()
        )
        (folder / place / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")
