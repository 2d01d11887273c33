"""One way to say something once."""

from __future__ import annotations

import logging
from functools import cache


@cache
def warn_once(logger: logging.Logger, message: str) -> None:
    """Log a warning the first time that this logger is given this message."""
    logger.warning(message)
