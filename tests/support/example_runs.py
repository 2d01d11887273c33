"""The examples as their reader runs them: on tiny checkpoints under the names of real ones, with what they did kept."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from documents import ROOT
from real_checkpoints import photos, real_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import vgs_step
from vgs_kernels import VGSObjective

EXAMPLES = ROOT / "examples"
STUDENT, TEACHER = "Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"
QUESTIONS = ("what is in the picture ?", "how many squares are there in the second picture ?", "seven or nine ?")
COUNT = 8  # questions
#: Independent of how a batch is split: the gate's threshold is that of each response alone.
OBJECTIVE = VGSObjective(gamma=1.5, lam=0.5, vds_scope="trajectory")
#: Settings of the hosts under which a step is plain SGD.
PLAIN = ["--optim", "sgd", "--lr_scheduler_type", "constant", "--max_grad_norm", "0", "--use_cpu", "true"]
PLAIN += ["--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no"]


def make_workplace(folder: Path, family: str = "qwen3_vl", names: tuple[str, str] = (STUDENT, TEACHER)) -> Path:
    """A folder with both models, eight questions about pictures, and the project's configs and examples.

    Args:
        folder: where.
        family: of both models, see ``real_checkpoint``.
        names: of student and teacher.
    """
    for name in names:
        real_checkpoint(family, folder / name, teacher=name == names[1])
    pictures = photos(folder / "photos")
    rows = [
        {"question": QUESTIONS[i % 3], "images": [f"photos/{pictures[i % 4].name}"], "answer": "seven"}
        for i in range(COUNT)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run_example(name: str, *words: str) -> dict[str, Any]:
    """The names that an example leaves behind, run with these words behind its own on the command line.

    Args:
        name: a file of ``examples/``.
        *words: of the command line.
    """
    with mock.patch.object(sys, "argv", [name, *words]):
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


class Recorder:
    """Stands in for ``vgs_step``: with another objective, and keeps samples, responses and loss of every call."""

    def __init__(self, objective: VGSObjective = OBJECTIVE) -> None:
        self.objective = objective
        self.calls: list[tuple[list[dict], list[list[list[int]]]]] = []
        self.losses: list[float] = []

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        processor: Any,
        samples: Any,
        responses: Any,
        _: Any,
        **options: Any,
    ) -> Any:
        output = vgs_step(student, teacher, processor, samples, responses, self.objective, **options)
        self.calls.append((list(samples), responses))
        self.losses.append(output.loss.item())
        return output

    def joined(self, first: int = 0, count: int | None = None) -> tuple[list[dict], list[list[list[int]]]]:
        """Samples and responses of some calls as one batch."""
        chosen = self.calls[first:][:count]
        return [x for samples, _ in chosen for x in samples], [x for _, answers in chosen for x in answers]


def fresh(name: str = STUDENT) -> nn.Module:
    """A model as its checkpoint in the working directory has it."""
    return AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32)


def one_step(
    steps: Sequence[tuple[list[dict], list]], rate: float, clip: float | None = None
) -> tuple[list[float], dict[str, Tensor]]:
    """What plain SGD makes of the student: one ``vgs_step`` on each batch as a whole.

    Args:
        steps: samples and responses of each optimizer step.
        rate: the learning rate.
        clip: greatest norm of the gradient.

    Returns:
        The losses, and the weights in the end.
    """
    student, teacher, processor = fresh().train(), fresh(TEACHER).eval(), AutoProcessor.from_pretrained(STUDENT)
    optimizer, losses = torch.optim.SGD(student.parameters(), lr=rate), []
    for samples, responses in steps:
        output = vgs_step(student, teacher, processor, samples, responses, OBJECTIVE)
        output.loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    return losses, student.state_dict()


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal to rounding, and not those of the checkpoint."""
    before = fresh().state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = max((value - before[name]).abs().max().item() for name, value in expected.items())
    assert moved > 1e-3, "the step is as small as rounding"
