"""Whether a host's methods that are overridden or called still have the parameters that we know."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

from ..errors import ConfigError


def check_signatures(host: str, known: str, functions: Mapping[Callable[..., Any], str]) -> None:
    """Stop where a function of a host has other parameters.

    Args:
        host: the name of its package.
        known: the version that the parameters were recorded with.
        functions: function -> its parameters, separated by commas.

    Raises:
        ConfigError: naming the function, its parameters and both versions.
    """
    for function, expected in functions.items():
        function = inspect.unwrap(function)
        found = ", ".join(inspect.signature(function).parameters)
        if found != expected:
            raise ConfigError(
                f"{function.__qualname__} of {host} {version(host)} has the parameters ({found}), but VGS knows "
                f"({expected}) of version {known}; install {host}=={known}."
            )
