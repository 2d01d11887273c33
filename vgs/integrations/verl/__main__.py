"""Says whether verl trains with VGS in this environment, before a cluster is asked for."""

from __future__ import annotations

import sys

from ...errors import ConfigError
from ..options import read_options
from . import VENDOR, chosen


def main() -> str:
    """The sentence.

    Raises:
        ConfigError: the engine is not chosen, is not there, or its options are wrong.
    """
    if not chosen():
        raise ConfigError(f"VERL_ENGINE_VENDOR must be {VENDOR!r}; without it verl takes its own engine.")
    options = read_options(needs_teacher=True)
    from verl.workers.engine import EngineRegistry

    from .engine import BACKENDS, VGSEngine

    engines = EngineRegistry._engines["language_model"]
    if not all(VGSEngine in engines[backend].values() for backend in BACKENDS):
        raise ConfigError("verl has no engine of the vendor vgs; this version of verl registers engines otherwise.")
    return f"verl trains with VGS: objective {options.objective}, teacher {options.teacher}."


if __name__ == "__main__":
    try:
        print(main())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
