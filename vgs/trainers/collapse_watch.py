"""What steering remembers of a run: the measured eta, what the guard of gamma has seen, and an early warning of the
method's one known collapse."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..errors import ConfigError
from ..objectives.eta import eta_at
from .gamma_guard import allowed, followed, running_mean

if TYPE_CHECKING:
    from .settings import VGSOptions

logger = logging.getLogger(__name__)

COLLAPSE_ADVICE = (
    "The student's text-only prior drifts away from the teacher's (language {start:.3f} -> {now:.3f} nats per token) "
    "while the student hardly looks at the image (KL(p_I || p_x) {student_vds:.3f}, teacher {vds:.3f}). With the "
    "student's own prior the steered target then feeds back on itself, and training can collapse. Guard gamma "
    '(gamma_guard), lower it (0.5), raise lam (1), take the prior from the initial student (prior="frozen"), or '
    "distil plainly (gamma=0) until the student sees more."
)
#: Mean dependency of the teacher's, nats per token, below which a step has nothing to see.
NO_EVIDENCE = 1e-6


class SteeringState(TrainerCallback, ExportableState):
    """What steering must remember across a resume: eta, how much the student sees and how far `language` has climbed.

    As a callback with exportable state it is written into every checkpoint's ``trainer_state.json`` by the host
    trainer, and read back from there when training starts.

    Attributes:
        ratios: measured ||grad standard|| / ||grad (standard + gamma * visual)|| (arXiv 2606.00564, Eq. 15), of
            ``eta="measure"``.
        ratio: the last one, or a running mean, of ways to measure it over and over; None before the first.
        language_start: the first ``window`` observations of the language term, nats per token.
        recent: the last ``window`` observations of language, student_vds and vds.
        warned: whether the collapse warning has been given.
        sight, language: running means for the guard of gamma, see ``gamma_guard``; None before the first step.
        guard: what it multiplies gamma with, in [0, 1]; 0 until ``language_start`` is whole.
    """

    window = 5
    climb = 2.0  # warn when `language` passes climb * start + margin ...
    margin = 0.2
    blind = 0.25  # ... while KL(p_I || p_x) is below this fraction of the teacher's KL(q_I || q_x)

    def __init__(self) -> None:
        self.ratios: list[float] = []
        self.ratio: float | None = None
        self.language_start: list[float] = []
        self.warned = False
        self.recent: list[list[float]] = []
        self.sight: float | None = None
        self.language: float | None = None
        self.guard = 0.0
        # Sums of this optimizer step's micro-batches, each with its number of tokens; empty between two steps.
        self._step: list[list[float]] = []
        self._norms: list[list[float]] = []  # likewise, of gradients

    def state(self) -> dict[str, Any]:
        names = ("ratios", "language_start", "recent", "warned", "ratio", "sight", "language", "guard")
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

    def eta_at(self, mode: str, share: float, unknown: float) -> float:
        """eta with a share of gamma in force.

        Args:
            mode: how it is measured. A run that had another one before starts from the ratio of that.
            share: of gamma.
            unknown: the ratio to take before any was measured.
        """
        measured = fmean(self.ratios) if self.ratios else None
        found = (measured, self.ratio) if mode == "measure" else (self.ratio, measured)
        return eta_at(next((ratio for ratio in found if ratio is not None), unknown), share)

    @staticmethod
    def quotient(standard_norm: float, steered_norm: float) -> float:
        """eta of two measured norms.

        Raises:
            ConfigError: a norm is zero or not finite, so there is no ratio.
        """
        if not (0 < standard_norm < math.inf and 0 < steered_norm < math.inf):
            raise ConfigError(
                f"eta could not be measured: the gradient norms are {standard_norm} (standard) and {steered_norm} "
                "(steered), expected positive and finite ones. Set eta to a number instead."
            )
        return standard_norm / steered_norm

    def add_ratio(self, standard_norm: float, steered_norm: float) -> None:
        """Record one measurement of ``eta="measure"``; raises as ``quotient``."""
        self.ratios.append(self.quotient(standard_norm, steered_norm))

    def keep_ratio(self, ratio: float, decay: float) -> None:
        """Record one of many measurements, with this weight of what was known before."""
        self.ratio = running_mean(self.ratio, ratio, decay)

    def add_norms(self, squares: Sequence[float], micro_batches: int) -> float | None:
        """Take in one micro-batch's squared gradient norms, of standard and of what is steered, as they stand in the
        optimizer step's loss; the quotient of the norms once the whole step is seen, if there is one."""
        self._norms.append(list(squares))
        if len(self._norms) < micro_batches:
            return None
        standard, steered = (sum(column) for column in zip(*self._norms, strict=True))
        self._norms.clear()
        return math.sqrt(standard / steered) if 0 < standard < math.inf and 0 < steered < math.inf else None

    def gamma(self, options: VGSOptions, step: int) -> float:
        """gamma in an optimizer step: of the settings, times the warm-up, times the guard.

        Args:
            options: of the run.
            step: optimizer steps done.
        """
        risen = min(1.0, step / options.gamma_warmup_steps) if options.gamma_warmup_steps else 1.0
        return options.gamma * risen * (self.guard if options.guards_gamma else 1.0)

    def observe(self, means: Mapping[str, float], micro_batches: int, tokens: float = 1.0) -> None:
        """Take in one micro-batch; once a whole optimizer step is seen, ``watch`` its means.

        Args:
            means: the micro-batch's mean terms over the tokens of all ranks, nats per token.
            micro_batches: of an optimizer step.
            tokens: that the means are of.
        """
        terms = [means[name] for name in ("language", "student_vds", "vds")]
        seen = means.get("sight", 0.0) * means["vds"]
        self._step.append([tokens, *(tokens * x for x in (*terms, seen))])
        if len(self._step) < micro_batches:
            return
        count, *sums = (sum(column) for column in zip(*self._step, strict=True))
        self._step.clear()
        if count == 0 or not all(math.isfinite(total) for total in sums):
            return
        language, student_vds, vds, seen = (total / count for total in sums)
        self.watch(language, student_vds, vds)
        self.language = running_mean(self.language, language)
        if vds > NO_EVIDENCE:
            self.sight = running_mean(self.sight, seen / vds)
        if len(self.language_start) == self.window:
            self.guard = followed(self.guard, allowed(self.sight, self.language, fmean(self.language_start)))

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
