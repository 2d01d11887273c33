"""What the tests inside other trainers measure, printed behind their results: docs/hosts.md quotes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

LARGEST: dict[str, float] = {}


@pytest.fixture(scope="session")
def measured() -> Callable[[str, float], float]:
    """``measured(what, value)`` returns the value, of which the largest of its name is printed at the end."""

    def keep(what: str, value: float) -> float:
        LARGEST[what] = max(value, LARGEST.get(what, value))
        return value

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, value in LARGEST.items():
        terminalreporter.write_line(f"measured, at most: {value:.1e} {what}")
