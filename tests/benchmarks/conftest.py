"""How tests run the command of the benchmarks: in this process, which has imported everything already."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from benchmarks.__main__ import main


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """``python -m benchmarks`` with these arguments."""

    def run(*arguments: str) -> Done:
        monkeypatch.setattr("sys.argv", ["benchmarks", *arguments])
        try:
            code = main()
        except SystemExit as stopped:
            code = stopped.code
        return Done(code, *capsys.readouterr())

    return run
