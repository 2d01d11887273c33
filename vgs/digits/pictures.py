"""Pictures of real handwritten digits, questions about them, and answers that reason in a few words.

The pictures are scikit-learn's 1,797 handwritten digits (8x8 pixels), two or three of them placed side by side with
noise. The digits are split *by image*: no handwritten digit of one split ever appears in another. An answer first reads
the digits that matter and then concludes, in one of 16 phrasings, so that what is read (vision) and how it is said
(language) are separate things to learn.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

CELL = 16  # pixels: every digit has a square cell of its own, so a picture is 32x16 or 48x16
NOISE = 0.05  # standard deviation of the pictures' noise, where black is 0 and white 1
SPLITS = ("train", "validation", "test")
NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
]
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}

# kind -> (question forms, noun of the conclusion); "read" asks for one digit, the others for two
KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "read": (("what is the {a} digit ?", "which digit is {place} ?", "read the {a} digit ."), "answer"),
    "sum": (("what is the sum of the {a} and the {b} digit ?", "add the {a} and the {b} digit ."), "sum"),
    "difference": (
        ("what is the difference of the {a} and the {b} digit ?", "how far apart are the {a} and the {b} digit ?"),
        "difference",
    ),
    "larger": (("which is larger , the {a} or the {b} digit ?", "give the larger of {a} and {b} ."), "larger digit"),
    "smaller": (
        ("which is smaller , the {a} or the {b} digit ?", "give the smaller of {a} and {b} ."),
        "smaller digit",
    ),
}
CAPTION_REQUEST = "read all digits from left to right ."
# how a digit is read, and what stands between two of them
READINGS = (
    ("the {a} digit is {x}", " and "),
    ("i see {x} {place}", " and "),
    ("{a} : {x}", " ; "),
    ("{place} stands {x}", " and "),
)
CONCLUSIONS = (
    ", so the {noun} is {z} .",
    ". that makes the {noun} {z} .",
    ". {noun} : {z} .",
    ", hence the {noun} must be {z} .",
)


@dataclass(frozen=True)
class Example:
    """One picture with one question.

    Attributes:
        question: what is asked. answer: the number word that counts. target: a full answer, in one phrasing.
        kind: a key of `KINDS`, or "caption". read: the digits that the answer reads, left to right.
        source: indices of the picture's handwritten digits among the 1,797, left to right.
        seed: of the picture's jitter and noise. noise: how strong the noise is.
    """

    question: str
    answer: str
    target: str
    kind: str
    read: tuple[int, ...]
    source: tuple[int, ...]
    seed: int
    noise: float = NOISE

    @functools.cached_property
    def image(self) -> Image.Image:
        """The picture, drawn when first needed."""
        return draw_picture(handwritten()[0][list(self.source)], np.random.default_rng(self.seed), self.noise)

    def prompt(self) -> list[dict[str, str]]:
        """The question as one user message."""
        return [{"role": "user", "content": self.question}]

    def record(self) -> dict:
        """The row that trainers consume: prompt, images, answer."""
        return {"prompt": self.prompt(), "images": [self.image], "answer": self.answer}


@dataclass(frozen=True)
class Habits:
    """How often a speaker uses each reading and each conclusion (weights, normalised here)."""

    readings: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    conclusions: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Indices of a reading and a conclusion."""
        scales = np.cumsum(self.readings), np.cumsum(self.conclusions)
        reading, conclusion = (int(np.searchsorted(s, rng.random() * s[-1], side="right")) for s in scales)
        return reading, conclusion


@functools.cache
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """The digits: float32 images [1797, 8, 8] in 0..1 and int64 labels [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return (bunch.images / 16.0).astype(np.float32), bunch.target.astype(np.int64)


@functools.cache
def split_indices(split: str) -> np.ndarray:
    """Indices of the handwritten digits of a split: three quarters train, one eighth validation, one eighth test.

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    count = len(handwritten()[1])
    order = np.random.default_rng(1797).permutation(count)
    first, second = 3 * count // 4, 7 * count // 8
    parts = dict(zip(SPLITS, (order[:first], order[first:second], order[second:]), strict=True))
    return np.sort(parts[split])


def draw_picture(digits: np.ndarray, rng: np.random.Generator, noise: float = NOISE) -> Image.Image:
    """Places two or three digits [n, 8, 8] (0..1) side by side, each jittered, stretched and dimmed, with noise."""
    canvas = np.zeros((CELL, CELL * len(digits)), dtype=np.float32)
    for position, digit in enumerate(digits):
        width, height = int(rng.integers(11, 15)), int(rng.integers(12, 16))
        left = position * CELL + int(rng.integers(0, CELL - width + 1))
        top = int(rng.integers(0, CELL - height + 1))
        glyph = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.BILINEAR))
        canvas[top : top + height, left : left + width] = glyph * rng.uniform(0.8, 1.0)
    canvas += rng.normal(0.0, noise, canvas.shape).astype(np.float32)
    grey = (255 * np.clip(canvas, 0.0, 1.0)).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def conclude(kind: str, read: Sequence[int]) -> int:
    """The number that a question of this kind about these digits has as its answer."""
    if kind == "read":
        return read[0]
    first, second = read
    return {"sum": first + second, "difference": abs(first - second), "larger": max(read), "smaller": min(read)}[kind]


def phrase(kind: str, places: Sequence[str], read: Sequence[int], reading: int, conclusion: int) -> str:
    """A full answer: the digits at `places`, read in one way, and the conclusion drawn from them in another."""
    form, between = READINGS[reading]
    seen = between.join(form.format(a=a, place=PLACES[a], x=NUMBERS[x]) for a, x in zip(places, read, strict=True))
    return f"{seen} " + CONCLUSIONS[conclusion].format(noun=KINDS[kind][1], z=NUMBERS[conclude(kind, read)])


def examples(split: str, seed: int, habits: Habits = Habits(), noise: float = NOISE) -> Iterator[Example]:
    """An endless, reproducible stream of examples whose digits all belong to `split`."""
    pool, labels = split_indices(split), handwritten()[1]
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    kinds = list(KINDS)
    while True:
        source = tuple(int(i) for i in pool[rng.integers(len(pool), size=int(rng.integers(2, 4)))])
        names = list(PLACES) if len(source) == 3 else ["left", "right"]
        kind = kinds[rng.integers(len(kinds))]
        subsets = list(itertools.combinations(range(len(source)), 1 if kind == "read" else 2))
        chosen = subsets[rng.integers(len(subsets))]
        places, read = [names[i] for i in chosen], tuple(int(labels[source[i]]) for i in chosen)
        forms = KINDS[kind][0]
        yield Example(
            question=forms[rng.integers(len(forms))].format(a=places[0], b=places[-1], place=PLACES[places[0]]),
            answer=NUMBERS[conclude(kind, read)],
            target=phrase(kind, places, read, *habits.draw(rng)),
            kind=kind,
            read=read,
            source=source,
            seed=int(rng.integers(2**31)),
            noise=noise,
        )


def caption(example: Example) -> Example:
    """The same picture with the plainest question: every digit from left to right, and nothing else."""
    read = tuple(int(handwritten()[1][i]) for i in example.source)
    words = [NUMBERS[digit] for digit in read]
    return replace(
        example, question=CAPTION_REQUEST, answer=words[-1], target=" ".join([*words, "."]), kind="caption", read=read
    )


def take(split: str, size: int, seed: int, habits: Habits = Habits(), noise: float = NOISE) -> list[Example]:
    """The first `size` examples of the stream.

    Args:
        split: "train", "validation" or "test".
        size: how many.
        seed: which ones; the same seed gives the same.
        habits: of the speaker who answers.
        noise: of the pictures.

    Raises:
        ValueError: another split.
    """
    return list(itertools.islice(examples(split, seed, habits, noise), size))


def vocabulary() -> list[str]:
    """Every word that questions and answers can contain, sorted."""
    fields = re.compile(r"\{\w+\}")
    forms = [*itertools.chain.from_iterable(k[0] for k in KINDS.values()), *(k[1] for k in KINDS.values())]
    forms.append(CAPTION_REQUEST)
    forms += [*itertools.chain.from_iterable(READINGS), *CONCLUSIONS, *PLACES, *PLACES.values(), *NUMBERS]
    return sorted({word for form in forms for word in fields.sub(" ", form).split()})


def number_words(text: str) -> list[int]:
    """The numbers named in a text, in order."""
    return [NUMBERS.index(word) for word in text.split() if word in NUMBERS]


def scorer(completion_text: str, gold_answer: str) -> bool:
    """Whether the last number word of a completion is the gold answer (each phrasing ends with its conclusion).

    Raises:
        ValueError: ``gold_answer`` is no number word.
    """
    if gold_answer not in NUMBERS:
        raise ValueError(f"gold_answer must be a number word from {NUMBERS[0]} to {NUMBERS[-1]}, got {gold_answer!r}")
    named = number_words(completion_text)
    return bool(named) and NUMBERS[named[-1]] == gold_answer


def digits_read(completion_text: str, example: Example) -> int:
    """How many of the digits the question is about were read correctly (the first number words of a completion)."""
    named = number_words(completion_text)
    return sum(a == b for a, b in zip(named, example.read, strict=False))
