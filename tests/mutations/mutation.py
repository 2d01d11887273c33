"""What a planted fault is."""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One changed line.

    Attributes:
        name: short, unique.
        breaks: what is wrong then, in one sentence.
        file: where the line is. If it has moved, it is searched for in the whole package.
        line: as it stands there, without indentation; it must occur exactly once.
        mutated: what replaces it.
        tests: files (``test_x``) that should notice, the cheapest first. Those that do not exist are left out.
        rooms: folders of ``tests`` that are tried where none of these files notices.
    """

    name: str
    breaks: str
    file: str
    line: str
    mutated: str
    tests: tuple[str, ...]
    rooms: tuple[str, ...]
