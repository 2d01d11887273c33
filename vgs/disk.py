"""Files that are written whole or not at all, and results that take long to compute, kept as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, and no other file on the way.

    Args:
        path: of the file; its folder is made if missing. content: of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder, as a temporary file would keep others from reading what it becomes.
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as staged:
        part = Path(staged) / path.name
        part.write_bytes(content)
        part.replace(path)


def remembered(path: Path, compute: Callable[[], Any], keep: Callable[[Any], bool] = lambda _: True) -> Any:
    """What ``compute`` gives (plain JSON), from a file where it was computed before.

    A folder that cannot be written is no error: then nothing is kept.

    Args:
        path: of the file; its name holds a hash of everything that the result depends on.
        compute: called where there is no such file, or none that can be read.
        keep: whether a result is worth a file.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass
    result = compute()
    if not keep(result):
        return result
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(result))
        part.replace(path)  # at once: another process sees all of it or nothing
    except OSError:
        with suppress(OSError):  # there may be no folder at all, or none that may be looked into
            part.unlink()
    return result
