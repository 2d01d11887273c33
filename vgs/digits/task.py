"""The built-in task: two or three real handwritten digits in a picture, and a question about them.

Everything a run needs, without downloads: ``build`` makes the questions, ``pretrained`` the teacher and the student,
``scorer`` says whether an answer is right. The parts are in ``pictures`` (pictures, questions, phrasings), ``models``
(tokenizer, processor, tiny Qwen3-VL models), ``pretraining`` (supervised training) and ``cache`` (trained models).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .pictures import NOISE, scorer, take
from .pretraining import pretrained

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["build", "pretrained", "scorer"]


def build(split: str, size: int, seed: int = 0, noise: float = NOISE) -> Dataset:
    """Questions as a dataset with the columns that ``VGSTrainer`` consumes.

    Args:
        split: "train", "validation" or "test"; no handwritten digit is in two of them.
        size: number of questions.
        seed: which questions; the same seed gives the same dataset.
        noise: standard deviation of the pictures' noise (black is 0, white 1).

    Returns:
        ``prompt`` (one user message), ``images`` (one RGB picture of 32x16 or 48x16 pixels), ``answer`` (a number
        word).
    """
    from datasets import Dataset, Features, Image, List, Value

    features = Features(
        {
            "prompt": List({"role": Value("string"), "content": Value("string")}),
            "images": List(Image()),
            "answer": Value("string"),
        }
    )
    records = [example.record() for example in take(split, size, seed, noise=noise)]
    return Dataset.from_list(records, features=features)
