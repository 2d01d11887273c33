"""What a run looks at beside its loss: the same questions answered again and again, and the geometry of its gradients.

Nothing of it changes what is learned: answers are greedy, no gradient is left behind, and random numbers are as before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.messages import shared_format
from ..data.prompts import encode_groups
from ..data.responses import response_texts
from ..errors import ConfigError
from ..evaluation.geometry import GeometryProbe, measure
from ..evaluation.sampling import Sampling, sample_responses
from ..evaluation.token_values import keep, token_values, write_samples
from ..models.forward import score_groups
from ..models.groups import PromptGroup, response_ids, response_lengths
from ..models.heads import read_head
from ..teachers.protocol import Teacher
from .routes import routes_of
from .run_folder import INSTRUMENTS
from .step import UNSHARDED

GEOMETRY_SAMPLES, BINS, PROJECTIONS = 8, 10, 8


def both_views(teacher: Teacher) -> Callable[[list[PromptGroup]], tuple[Tensor, Tensor]]:
    """A teacher as a function from groups to its [N, Dt] hidden states with and without images.

    It is ready during the call alone: one that is offloaded must not stay on the device.

    Args:
        teacher: of a run.
    """

    def states(groups: list[PromptGroup]) -> tuple[Tensor, Tensor]:
        with teacher.ready():
            found = teacher.states(groups, True, lambda rows: {"image": rows[0], "text": rows[1]})
        return found["image"], found["text"]

    return states


def add_instruments(trainer: Any) -> None:
    """Let a trainer whose settings ask for it look at its samples and gradients.

    Args:
        trainer: with its teachers.

    Raises:
        ConfigError: see ``Instruments``.
    """
    if trainer.args.save_samples or trainer.args.geometry_every is not None:
        trainer.add_callback(Instruments(trainer))


class Instruments(TrainerCallback):
    """Keeps samples and gradients' angles of a trainer, as its settings say.

    Args:
        trainer: of this package, with its teachers.

    Raises:
        ConfigError: sharded parameters, a teacher that cannot score new answers, or data without a length.
    """

    def __init__(self, trainer: Any) -> None:
        args = trainer.args
        self.trainer, self.folder = trainer, Path(args.output_dir, INSTRUMENTS)
        self._looked: set[tuple[str, int]] = set()
        named = "save_samples" if args.save_samples else "geometry_every"
        if trainer.accelerator.distributed_type not in UNSHARDED:
            raise ConfigError(f"{named} needs whole parameters (one process, or DDP); leave it out here.")
        if not trainer.step_scorer.teachers or not all(found.source.live for found in trainer.opened.values()):
            raise ConfigError(f"{named} needs a teacher that can score new answers (a path or a url). Leave it out.")
        data = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
        data = next(iter(data.values())) if isinstance(data, dict) else data
        if not hasattr(data, "__getitem__"):
            raise ConfigError(f"{named} needs data with a length, got {type(data).__name__}.")
        count = min(max(args.save_samples, GEOMETRY_SAMPLES if args.geometry_every else 0), len(data))
        self.samples = [shared_format(data[index]) for index in range(count)]

    # ---- when

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == 0 and self.trainer.resume.pending is None:
            self.look(0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.look(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.look(state.global_step, last=True)

    def look(self, step: int, last: bool = False) -> None:
        """What is due at a step; the main process alone.

        Args:
            step: optimizer steps done. last: whether the training ends.
        """
        args = self.trainer.args

        def due(every: int | None) -> bool:
            return step == 0 or last or (every is not None and step % every == 0)

        wanted = set()
        if args.save_samples and due(args.save_samples_every):
            wanted.add(("samples", step))
        if args.geometry_every is not None and due(args.geometry_every):
            wanted.add(("geometry", step))
        wanted -= self._looked  # the last step may have been due by itself
        if not wanted or not self.trainer.accelerator.is_main_process:
            return
        self._looked |= wanted
        samples, geometry = (("samples", step) in wanted, ("geometry", step) in wanted)
        device = self.trainer.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self._look(step, samples, geometry)

    # ---- what

    def _look(self, step: int, samples: bool, geometry: bool) -> None:
        trainer, args = self.trainer, self.trainer.args
        student, processor = trainer.student, trainer.processing_class
        template, size = trainer.chat_template_kwargs, args.per_device_eval_batch_size
        asked = self.samples if geometry else self.samples[: args.save_samples]
        sampling = Sampling.from_settings(args, greedy=True)
        training = student.training
        student.eval()
        try:
            with trainer.accelerator.autocast():
                answers = sample_responses(student, processor, asked, sampling, batch_size=size, progress=False)
                device = trainer.accelerator.device
                groups = encode_groups(
                    processor, asked, [[ids] for ids in answers], trainer.placeholder_ids, device, **template
                )
                names = routes_of(asked, args.teacher_column, list(trainer.opened)) or [""] * len(groups)
                if samples:
                    count = args.save_samples
                    values = self._values(groups[:count], names[:count])
                    right = self._right(answers[:count])
                    write_samples(self.folder, step, processor, asked[:count], answers[:count], values, right)
                if geometry:
                    self._geometry(step, groups, names)
        finally:
            student.train(training)

    def _right(self, answers: Sequence[Sequence[int]]) -> list[bool | None]:
        texts = response_texts(self.trainer.processing_class, answers)
        golds = [sample.get("answer") for sample in self.samples]
        return [
            None if gold is None else bool(self.trainer.scorer(text, gold))
            for text, gold in zip(texts, golds, strict=False)
        ]

    @torch.no_grad()
    def _values(self, groups: list[PromptGroup], names: Sequence[str]) -> list[dict[str, Tensor]]:
        """The values of every answer's tokens, a few answers at a time."""
        args, student, found = self.trainer.args, self.trainer.student, {}
        for name, teacher in self.trainer.step_scorer.teachers.items():
            places = iter([place for place, own in enumerate(names) if own == name])
            while chosen := list(islice(places, args.per_device_eval_batch_size)):
                part = [groups[place] for place in chosen]
                taught = both_views(teacher)(part)
                rows = score_groups(student, part)
                with teacher.head(rows[0].dtype) as teacher_head:
                    columns = token_values(
                        rows,
                        read_head(student, rows[0].dtype),
                        taught,
                        teacher_head,
                        response_ids(part).to(rows[0].device),
                        temperature=args.temperature_of_loss,
                        vocab_size=args.vocab_size,
                    )
                lengths = response_lengths(part)
                split = {name: column.float().cpu().split(lengths) for name, column in columns.items()}
                for row, place in enumerate(chosen):
                    found[place] = {name: parts[row] for name, parts in split.items()}
        return [found[place] for place in range(len(groups))]

    def _geometry(self, step: int, groups: list[PromptGroup], names: Sequence[str]) -> None:
        """One measurement for the first teacher's questions, by projections."""
        args, student = self.trainer.args, self.trainer.student
        name = names[0]
        own = [group for group, found in zip(groups, names, strict=True) if found == name]
        teacher, size = self.trainer.step_scorer.teachers[name], args.per_device_eval_batch_size
        batches = [own[first : first + size] for first in range(0, len(own), size)]
        with teacher.head(read_head(student, torch.float32).weight.dtype) as head:
            probe = GeometryProbe(
                student, batches, both_views(teacher), head, args.temperature_of_loss, args.vocab_size
            )
            bins = min(BINS, len(probe.vds))
            record = measure(probe, bins, PROJECTIONS)
        keep(self.folder / f"geometry-{step:06d}.json", {**record, "step": step, "samples": len(own)})
