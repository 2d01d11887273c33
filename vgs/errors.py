"""The one class of errors that a user can cause and mend; the command line prints its sentence and exits with 2."""

from __future__ import annotations


class ConfigError(ValueError):
    """What a run is asked to do cannot be done with these settings, models or data; found before training starts.

    The message is one sentence that names the argument, what came and what was expected.
    """
