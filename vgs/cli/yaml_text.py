"""YAML as a run's settings need it: no key twice, and 1e-6 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from ..errors import ConfigError

#: YAML 1.1 reads numbers such as 1e-6, without a dot or a sign of the exponent, as text.
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$")


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes the last of two equal keys, made strict."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a key that stands twice in it is an error (one that ``<<`` brings in may be replaced)."""
        seen: dict[Any, int] = {}
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, (str, int, float)) and key in seen:
                raise ConfigError(f"the key {key!r} stands twice, in lines {seen[key]} and {line}; keep one of them.")
            if isinstance(key, (str, int, float)):
                seen[key] = line
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


def read_yaml(text: str, name: str) -> Any:
    """The content of a YAML text; None where it is empty.

    Args:
        text: the text.
        name: what it is, for the messages, e.g. a file's name.

    Raises:
        ConfigError: no YAML, or a key that stands twice.
    """
    try:
        return yaml.load(text, Loader=StrictLoader)  # a safe loader
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
