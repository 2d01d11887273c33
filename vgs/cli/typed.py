"""Settings have the types of the classes that take them; jsonargparse says whether a value is of a type."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from ..errors import ConfigError
from .keys import Key, kind_name
from .yaml_text import NUMBER

#: Texts that would be of another type without their quotes.
QUOTED = re.compile(r"[-+]?[\d.]+|true|false|yes|no|on|off", flags=re.IGNORECASE)


@functools.cache
def _parser(kind: Any) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def typed(value: Any, key: Key, where: str) -> Any:
    """A value in the form that its key wants: numbers where a text only looks like one, words for yes and no.

    Args:
        value: as YAML has it.
        key: that it belongs to.
        where: the key's dotted name, for the message.

    Raises:
        ConfigError: a value of another type.
    """
    if value is None:
        return None  # as if it were left out
    leaves = key.leaves
    if Any in leaves:
        return value
    words = {leaf for leaf in leaves if isinstance(leaf, type) and issubclass(leaf, str)}
    if isinstance(value, str) and NUMBER.fullmatch(value) and {float, int} & leaves:
        value = float(value)
    if isinstance(value, str) and not words and typing.Literal not in map(typing.get_origin, leaves):
        raise _refused(where, key, value, " (without quotes)" if QUOTED.fullmatch(value) else "")
    if type(value) in leaves:
        return value
    if isinstance(value, float) and value.is_integer() and int in leaves and float not in leaves:
        return int(value)
    if isinstance(value, bool) and str not in leaves:
        raise _refused(where, key, value)
    if value is False and where.endswith("_strategy"):
        return "no"  # YAML reads a bare `no` as false
    if isinstance(value, str) and words:
        return value
    try:
        result = _parser(key.kind).parse_object({"value": value}).value
    except (ArgumentError, TypeError, ValueError) as error:
        raise _refused(where, key, value) from error
    return value if isinstance(value, (Mapping, list)) else result


def _refused(where: str, key: Key, value: Any, hint: str = "") -> ConfigError:
    return ConfigError(f"{where} must be {kind_name(key.kind)}{hint}, got {value!r}.")
