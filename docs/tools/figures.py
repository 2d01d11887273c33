"""Draws docs/pictures/: what the objective sees in one answer, computed with two models of the digits task.

    python docs/tools/figures.py

Both models have the student's size. One was trained as the demo's student is and teaches here; the other, the student,
has had a third of these lessons. They are trained once and kept (some minutes on a quiet core).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from vgs.data.prompts import encode_groups
from vgs.digits.models import DigitsProcessor
from vgs.digits.pictures import take
from vgs.digits.plots import COLOURS, INK, save
from vgs.digits.pretraining import RECIPES, pretrained
from vgs.digits.task import build
from vgs.models.families import placeholder_ids
from vgs.models.forward import score_groups
from vgs.models.heads import read_head
from vgs_kernels import VGSObjective
from vgs_kernels.reference import steered_target, vgs_reference

OUT = Path(__file__).parents[1] / "pictures"
GAMMA = 2.0
NAMES = {
    "p_I": "student, picture",
    "p_x": "student, no picture",
    "q_I": "teacher, picture",
    "q_x": "teacher, no picture",
}
FEWER = 3  # the student's share of lessons: one in so many


def models(cache: Path) -> tuple[Any, Any, DigitsProcessor]:
    """Student, teacher and their processor."""
    recipe = RECIPES["student"]
    shorter = replace(recipe, phases=tuple(replace(phase, steps=phase.steps // FEWER) for phase in recipe.phases))
    teacher, processor = pretrained("student", cache)
    student, _ = pretrained("student", cache, recipe=shorter)
    return student, teacher, processor
