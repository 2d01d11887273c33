"""What a cell is measured on: synthetic rows of a named shape, or those of a file of ``vgs capture``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .problem import SHAPES, VIEWS, Form, Problem, make_problem

_KIND, _FORM = "rows of the loss", 1


@dataclass(frozen=True)
class Inputs:
    """Where rows come from, in plain values: synthetic ones (``nats`` as of ``make_problem``), or a file's."""

    device: str
    dtype: str
    nats: float | None = None
    captured: str | None = None

    def make(self, shape: str, tokens: int) -> Problem:
        """The problem of a cell; of captured rows the first ``tokens``, whatever the shape is called."""
        dtype = getattr(torch, self.dtype)
        if self.captured is None:
            return make_problem(SHAPES[shape], tokens, dtype, self.device, nats=self.nats)
        from safetensors.torch import load_file

        notes, tensors = read_notes(Path(self.captured)), load_file(self.captured)
        temperature = notes["temperature"]

        def to(name: str) -> torch.Tensor | None:
            return tensors[name].to(self.device, dtype) if name in tensors else None

        def form(model: str, head: str) -> Form:
            # softcap / T * tanh(scale / T * x / (softcap / T)) is the logit divided by the temperature T.
            scale, softcap = notes[model]["scale"], notes[model]["softcap"]
            return Form(to(f"{head}_bias"), scale / temperature, None if softcap is None else softcap / temperature)

        heads = ("student", "student" if notes["one_head"] else "teacher")
        forms = map(form, ("student", "teacher"), heads)
        return Problem(*map(to, VIEWS), *(to(f"{head}_weight") for head in heads), *forms).first(tokens)

    @property
    def source(self) -> str:
        """In words, for tables."""
        if self.captured is None:
            return "synthetic"
        notes = read_notes(Path(self.captured))
        models = f"{notes['student']['name']}, taught by {notes['teacher']['name']}"
        return f"captured: {models}, config {notes['config'][:12]}"


def read_notes(path: Path) -> dict[str, Any]:
    """What a file of ``vgs capture`` says of itself.

    Raises:
        ValueError: it cannot be read, or is another file.
    """
    try:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            notes = json.loads(file.metadata()["notes"])
        if (notes["kind"], notes["form"]) != (_KIND, _FORM):
            raise ValueError(f"kind {notes['kind']!r}, form {notes['form']!r}")
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"--rows must be a file of vgs capture, got {path}: {error!r}") from error
    return notes
