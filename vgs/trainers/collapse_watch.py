"""What steering remembers of a run: the measured eta, and an early warning of the method's one known collapse."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError

logger = logging.getLogger(__name__)

COLLAPSE_ADVICE = (
    "The student's text-only prior drifts away from the teacher's (language {start:.3f} -> {now:.3f} nats per token) "
    "while the student hardly looks at the image (KL(p_I || p_x) {student_vds:.3f}, teacher {vds:.3f}). The steered "
    "target then feeds back on itself and training can collapse. Lower gamma (0.5), raise lam (1), take the "
    'prior from the initial student (prior="frozen"), or distil plainly (gamma=0) until the student sees more.'
)


class SteeringState(TrainerCallback, ExportableState):
    """What steering must remember across a resume: the measured eta and how far the language term has climbed.

    As a callback with exportable state it is written into every checkpoint's ``trainer_state.json`` by the host
    trainer, and read back from there when training starts.

    Attributes:
        ratios: measured ||grad standard|| / ||grad (standard + gamma * visual)|| (arXiv 2606.00564, Eq. 15).
        language_start: the first ``window`` observations of the language term, nats per token.
        recent: the last ``window`` observations of language, student_vds and vds.
        warned: whether the collapse warning has been given.
    """

    window = 5
    climb = 2.0  # warn when `language` passes climb * start + margin ...
    margin = 0.2
    blind = 0.25  # ... while KL(p_I || p_x) is below this fraction of the teacher's KL(q_I || q_x)

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.language_start: list[float] = []
        self.warned = False
        self.recent: list[list[float]] = []
        self._step: list[list[float]] = []  # means of this optimizer step's micro-batches; empty between two steps

    def state(self) -> dict[str, Any]:
        names = ("ratios", "language_start", "recent", "warned")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        stored = state.stateful_callbacks.get(type(self).__name__, self.state())
        for name, value in stored["attributes"].items():
            setattr(self, name, value)

    @property
    def eta(self) -> float:
        """Mean of the measured ratios."""
        return fmean(self.ratios)

    def add_ratio(self, standard_norm: float, steered_norm: float) -> None:
        """Record one measurement.

        Raises:
            ConfigError: a norm is zero or not finite, so there is no ratio.
        """
        if not (0 < standard_norm < math.inf and 0 < steered_norm < math.inf):
            raise ConfigError(
                f'eta="measure" found gradient norms {standard_norm} (standard) and {steered_norm} (steered), expected '
                "positive and finite ones. Set eta to a number instead."
            )
        self.ratios.append(standard_norm / steered_norm)

    def observe(self, means: Mapping[str, float], micro_batches: int) -> None:
        """Take in one micro-batch; once a whole optimizer step is seen, ``watch`` its means.

        Args:
            means: the micro-batch's mean terms, nats per token.
            micro_batches: of an optimizer step.
        """
        self._step.append([means[name] for name in ("language", "student_vds", "vds")])
        if len(self._step) >= micro_batches:
            self.watch(*[fmean(column) for column in zip(*self._step, strict=True)])
            self._step.clear()

    def watch(self, language: float, student_vds: float, vds: float) -> bool:
        """Observe one step's mean terms (nats per token); warn once, and return whether this call did."""
        if len(self.language_start) < self.window:
            self.language_start.append(language)
            return False
        self.recent = [*self.recent, [language, student_vds, vds]][-self.window :]
        if self.warned or len(self.recent) < self.window:
            return False
        start = fmean(self.language_start)
        now, student, teacher = (fmean(column) for column in zip(*self.recent, strict=True))
        if now > self.climb * start + self.margin and student < self.blind * teacher:
            self.warned = True
            logger.warning(COLLAPSE_ADVICE.format(start=start, now=now, student_vds=student, vds=teacher))
        return self.warned
