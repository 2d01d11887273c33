"""Settings of what a run measures beside its loss; none of them changes what is learned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError

MOST_SAMPLES = 64


@dataclass
class InstrumentOptions:
    """What the trainers' settings have for instruments; a mixin of ``VGSOptions``.

    Args:
        log_terms_by_bin: log the terms of the steered objective by bins of equally many tokens, from the lowest visual
            dependency to the highest: how many bins, such as 10. None: not at all.
        save_samples: keep the student's greedy answers to so many questions, with pictures and the values of every
            token, in ``output_dir/instruments``. Of the evaluation data, else of the training data. 0: none.
        geometry_every: measure the angles between the terms' gradients every so many optimizer steps, and at the start
            and the end, on the samples of ``save_samples`` (8 of them where it is 0). None: never.
        save_samples_every: optimizer steps between two looks at the samples; None: at the start and the end alone.
    """

    log_terms_by_bin: int | None = field(
        default=None, metadata={"help": "Log the terms by so many bins of visual dependency."}
    )
    save_samples: int = field(
        default=0, metadata={"help": "Questions whose answers are kept, with the values of every token."}
    )
    save_samples_every: int | None = field(
        default=None, metadata={"help": "Steps between two looks at them; left out: at the start and the end."}
    )
    geometry_every: int | None = field(
        default=None, metadata={"help": "Steps between measurements of the angles between the terms' gradients."}
    )

    def _check_instruments(self, preset: Any) -> None:
        """The settings in their ranges, and a preset that has what they show, of a teacher that sees what they ask.

        Raises:
            ConfigError: naming the setting.
        """
        for name, least in (("log_terms_by_bin", 2), ("save_samples_every", 1), ("geometry_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be >= {least} or left out, got {value}.")
        if not 0 <= self.save_samples <= MOST_SAMPLES:
            raise ConfigError(f"save_samples must lie in [0, {MOST_SAMPLES}], got {self.save_samples}.")
        if self.save_samples_every is not None and not self.save_samples:
            raise ConfigError(f"save_samples_every={self.save_samples_every} needs save_samples, got 0.")
        if (self.save_samples or self.geometry_every) and "privileged" in preset.views:
            name = "save_samples" if self.save_samples else "geometry_every"
            raise ConfigError(
                f"{name}={getattr(self, name)} needs a separate teacher that reads the student's prompt; that of "
                f"preset={preset.name!r} has privileged context. Leave it out."
            )
        if self.log_terms_by_bin is not None and not (preset.has_terms and self.log_terms):
            reason = "log_terms=True" if preset.has_terms else f"a preset with terms, which {preset.name!r} has not"
            raise ConfigError(f"log_terms_by_bin={self.log_terms_by_bin} needs {reason}.")
