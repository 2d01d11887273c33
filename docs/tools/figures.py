"""Draws docs/pictures/: what the objective sees in one answer, computed with two models of the digits task.

    python docs/tools/figures.py

Both models have the student's size. One was trained as the demo's student is, and teaches here; the other, the student,
has had a third of these lessons. They are trained once and kept (some minutes on a quiet core).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vgs.data.prompts import encode_groups
from vgs.digits.pictures import Example, take
from vgs.digits.plots import COLOURS, INK, save
from vgs.digits.pretraining import RECIPES, pretrained
from vgs.models.families import placeholder_ids
from vgs.models.forward import score_groups
from vgs.models.heads import read_head
from vgs_kernels import VGSObjective
from vgs_kernels.reference import steered_target, vgs_reference

OUT = Path(__file__).parents[1] / "pictures"
QUESTION = 0  # of the test split
FEWER = 3  # the student's share of lessons: one in so many
WORDS = 6  # shown of the vocabulary
OBJECTIVE = VGSObjective(gamma=2.0, lam=0.01)
OPINIONS = ("teacher, no picture", "teacher, picture", "student, no picture", "student, picture", "steered target q*")
SHADES = ("#bbccee", COLOURS[0], "#eebbcc", COLOURS[1], COLOURS[2])


class Case:
    """One question, the student's answer to it, and what both models say of every token of the answer.

    Args:
        cache: folder for trained models.

    Attributes:
        example: the question with its picture.
        words: T words of the answer.
        logits: float64 [T, V] each: of the student with and without the picture (s, a), and of the teacher (t, w).
        vocabulary: V words.
        terms: of the loss, [T] each.
    """

    def __init__(self, cache: Path) -> None:
        recipe = RECIPES["student"]
        fewer = replace(recipe, phases=tuple(replace(phase, steps=phase.steps // FEWER) for phase in recipe.phases))
        teacher, processor = pretrained("student", cache)
        student, _ = pretrained("student", cache, recipe=fewer)
        self.example: Example = take("test", QUESTION + 1, 0)[QUESTION]
        record = self.example.record()
        answer = self._answer(student, processor, record)
        groups = encode_groups(processor, [record], [[answer]], placeholder_ids(student.config))
        self.s, self.a = self._logits(student, groups)
        self.t, self.w = self._logits(teacher, groups)
        tokenizer = processor.tokenizer
        self.words = [tokenizer.decode([token]).strip() for token in answer]
        self.vocabulary = tokenizer.convert_ids_to_tokens(range(self.s.shape[1]))
        self.terms = vgs_reference(self.s, self.a, self.t, self.w, OBJECTIVE)

    @staticmethod
    @torch.no_grad()
    def _answer(student: Any, processor: Any, record: dict[str, Any]) -> list[int]:
        content = [{"type": "image"}, {"type": "text", "text": record["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[text], images=[record["images"]], return_tensors="pt")
        answer = student.generate(**inputs, max_new_tokens=30, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        return answer.tolist()

    @staticmethod
    @torch.no_grad()
    def _logits(model: Any, groups: Any) -> list[Tensor]:
        states = score_groups(model, groups)
        return [read_head(model, rows.dtype).logits(rows).double() for rows in states]

    def likeliest(self, place: int, *logits: Tensor) -> list[int]:
        """The words that any of some opinions holds likeliest at a place."""
        highest = torch.stack([x[place].softmax(0) for x in logits]).amax(0)
        return highest.topk(WORDS).indices.tolist()


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8, colors=INK)
    axis.set_axisbelow(True)


def whole_answer(case: Case, path: Path) -> None:
    """How much the picture changes each model's opinion of each word, and which words the gate takes."""
    figure = Figure(figsize=(8.2, 3.4), dpi=150, layout="constrained")
    left, axis = figure.subplots(1, 2, width_ratios=(1, 4))
    left.imshow(case.example.image)
    left.set_axis_off()
    left.set_title(f"{case.example.question}\n(answer: {case.example.answer})", fontsize=8, color=INK, wrap=True)
    places = np.arange(len(case.words))
    for shift, name, label, colour in (
        (-0.2, "vds", "teacher: vds", COLOURS[0]),
        (0.2, "student_vds", "student: student_vds", COLOURS[1]),
    ):
        axis.bar(places + shift, case.terms[name].numpy(), 0.4, label=label, color=colour, zorder=2)
    for place in places[case.terms["gate"].numpy()]:
        axis.axvspan(place - 0.5, place + 0.5, color="#ddcc77", alpha=0.35, linewidth=0, zorder=0)
    axis.axvspan(-9, -9, color="#ddcc77", alpha=0.35, linewidth=0, label="gate = 1")
    axis.set_xticks(places, case.words, rotation=60, ha="right")
    axis.set_xlim(-0.6, len(places) - 0.4)
    axis.set_ylabel("nats", fontsize=9, color=INK)
    axis.legend(framealpha=1, edgecolor="none", fontsize=8, loc="upper right")
    _plain(axis)
    save(figure, path)


def one_word(case: Case, place: int, path: Path) -> None:
    """Four opinions of one word of the answer, and the steered target that follows from three of them."""
    target = steered_target(*(x.log_softmax(-1) for x in (case.a, case.t, case.w)))
    opinions = (case.w, case.t, case.a, case.s, target)
    shown = case.likeliest(place, *opinions)
    figure = Figure(figsize=(8.2, 3.2), dpi=150, layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(opinions)
    for number, (logits, label, colour) in enumerate(zip(opinions, OPINIONS, SHADES, strict=True)):
        heights = logits[place].softmax(0)[shown].numpy()
        axis.bar(np.arange(WORDS) + (number - 2) * width, heights, width, label=label, color=colour)
    axis.set_xticks(np.arange(WORDS), [case.vocabulary[token] for token in shown])
    axis.set_ylabel("probability", fontsize=9, color=INK)
    before = " ".join(case.words[:place])
    axis.set_title(f"{before} ... (the student wrote: {case.words[place]})", fontsize=9, color=INK)
    axis.legend(frameon=False, fontsize=8)
    _plain(axis)
    save(figure, path)


def strength(case: Case, places: Sequence[int], path: Path) -> None:
    """The one target into which both terms merge, as gamma grows: softmax(t + gamma / (1 + gamma) * (a - w))."""
    gammas = np.linspace(0, 8, 81)
    targets = [case.t + gamma / (1 + gamma) * (case.a - case.w) for gamma in gammas]
    figure = Figure(figsize=(8.2, 3.2), dpi=150, layout="constrained")
    for axis, place in zip(figure.subplots(1, len(places), sharey=True), places, strict=True):
        shown = case.likeliest(place, targets[0], targets[-1])[:4]
        curves = torch.stack([target[place].softmax(0)[shown] for target in targets])
        for number, token in enumerate(shown):
            axis.plot(gammas, curves[:, number].numpy(), label=case.vocabulary[token], color=COLOURS[number])
        axis.axvline(OBJECTIVE.gamma, color=INK, linewidth=0.8, linestyle=":")
        axis.set_xlabel("gamma (0: plain distillation)", fontsize=9, color=INK)
        axis.set_ylim(0, 1.02)
        axis.set_title(
            f"... {' '.join(case.words[max(place - 4, 0) : place])} ... (the student wrote: {case.words[place]})\n"
            f"vds {case.terms['vds'][place]:.2f}",
            fontsize=8.5,
            color=INK,
        )
        axis.legend(frameon=False, fontsize=8, loc="center right")
        _plain(axis)
    figure.axes[0].set_ylabel("probability in the target", fontsize=9, color=INK)
    save(figure, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/vgs").expanduser(), help="for trained models")
    found = Case(parser.parse_args().cache)
    OUT.mkdir(exist_ok=True)
    most = int(found.terms["vds"].argmax())
    whole_answer(found, OUT / "one_answer.png")
    one_word(found, most, OUT / "one_word.png")
    strength(found, (most, int(found.terms["language"].argmax())), OUT / "strength.png")
