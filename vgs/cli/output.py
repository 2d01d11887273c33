"""Where results go: a file or folder that is known to be writable before any work is done, and stdout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, config_errors


def check_folder(path: Path) -> None:
    """Make the folder that ``--out`` names, and try to write there.

    Raises:
        ConfigError: neither is possible.
    """
    with config_errors(f"--out {str(path)!r} cannot be written", OSError):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass


def check_file(path: Path | None) -> None:
    """As ``check_folder``, for the file that ``--out`` names, if any.

    Raises:
        ConfigError: the file is a folder, or its folder cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"--out must be a file, got the folder {str(path)!r}.")
    check_folder(path.parent)


def report(result: Mapping[str, Any], path: Path | None) -> None:
    """Print a result as one line of JSON, and write it to a file, if any.

    Args:
        result: numbers by name.
        path: of the file; ``check_file`` has seen it.
    """
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
