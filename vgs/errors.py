"""The one class of errors that a user can cause and mend; the command line prints its sentence and exits with 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """What a run is asked to do cannot be done with these settings, models or data.

    The message is one sentence that names the argument, what came and what was expected.
    """


def in_one_line(error: BaseException) -> str:
    """What an error says, without its line breaks; its class's name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def config_errors(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors that a library raises at a user's input into a ``ConfigError``.

    Args:
        what: the argument and what came, e.g. ``"student.path 'x' cannot be loaded"``: the start of the sentence.
        *kinds: the classes of errors that the input can cause; others pass.

    Raises:
        ConfigError: ``what``, and the library's own words in one line.
    """
    try:
        yield
    except ConfigError:
        raise
    except kinds as error:
        raise ConfigError(f"{what}: {in_one_line(error)}") from error
