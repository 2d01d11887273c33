"""What the package says while it works: one logger, ``vgs``, with a child for every module."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from .errors import ConfigError

LEVEL = "VGS_LOG"  # environment variable of the command line: one of
LEVELS = ("debug", "info", "warning", "error")


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time that this logger is given this message."""
    logger.warning(message)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """What the command line does with the package's messages: a line each on stderr, of level ``VGS_LOG`` (info).

    A library does not configure logging; in a program of their own, users do so as for every other package.

    Raises:
        ConfigError: ``VGS_LOG`` names no level.
    """
    logger, handler = logging.getLogger("vgs"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    wanted, before = os.environ.get(LEVEL, "info"), logger.level
    if wanted not in LEVELS:
        raise ConfigError(f"{LEVEL} must be one of {', '.join(LEVELS)}, got {wanted!r}.")
    logger.addHandler(handler)
    logger.setLevel(wanted.upper())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
