"""An extension of griffe for the project's docstrings.

``a, b: meaning`` describes both names, and what ``:class:`Name``` and ``[N, D]`` mean to a reader of the source is
written in Markdown.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"(?m)^( *)(Args|Attributes|Raises):\n((?:\1 +.*\n?|\s*\n)+)")
#: One entry: names, a colon, the meaning; names and meaning may go on in lines that are indented further.
ENTRY = re.compile(r"(?ms)^(?P<indent> +)(?P<names>\**\w+(?:,\s+\**\w+)+):(?P<meaning>.*?)(?=^(?P=indent)\S|\Z)")
ROLE = re.compile(r":\w+:`~?([^`]+)`")
DOUBLE = re.compile(r"``([^`]+)``")
SHAPE = re.compile(r"(`[^`\n]*`)|(\[\[?[A-Z][^\[\]`()\n]*(?:\[[^\[\]`()\n]*\])?[^\[\]`()\n]*\](?!\())")


def one_entry_each(section: re.Match[str]) -> str:
    """A section in which every name has an entry of its own."""

    def split(entry: re.Match[str]) -> str:
        names = re.split(r",\s+", entry["names"])
        return "".join(f"{entry['indent']}{name}:{entry['meaning'].rstrip()}\n" for name in names)

    return f"{section[1]}{section[2]}:\n{ENTRY.sub(split, section[3])}"


def as_markdown(text: str) -> str:
    """A docstring of the project as griffe's parser and Markdown read it."""
    text = DOUBLE.sub(r"`\1`", ROLE.sub(r"`\1`", text)).replace("::\n", ":\n")
    text = SHAPE.sub(lambda match: match[1] or f"`{match[2]}`", text)
    return SECTION.sub(one_entry_each, text + "\n").rstrip()


class ProjectDocstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
