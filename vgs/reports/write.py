"""The files of a report, and the promise that nobody else's file is replaced."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..disk import write_whole
from ..errors import ConfigError
from .collect import KIND
from .page import GENERATOR, Page
from .png import SOFTWARE, pictures

logger = logging.getLogger(__name__)

PAGE, NUMBERS, FIGURES = "report.html", "report.json", "figures"


def write_report(numbers: Mapping[str, Any], out: Path, title: str) -> list[Path]:
    """Write ``report.html``, ``report.json`` and ``figures/*.png``; returns them.

    Args:
        numbers: of ``collect.collect``.
        out: an existing folder.
        title: of the page.

    Raises:
        ConfigError: a file of one of these names that this command has not written, or a file where the folder of the
            figures would be. Nothing is changed then.
    """
    # The page shows what the file has, digit by digit.
    stored = json.dumps(numbers, indent=1, allow_nan=False) + "\n"
    content = {
        out / PAGE: Page(json.loads(stored), title).whole().encode(),
        out / NUMBERS: stored.encode(),
    }
    try:
        drawn = pictures(numbers)
    except ImportError as error:
        logger.warning("No pictures are drawn, only the page: %s (pip install matplotlib).", error)
        drawn = {}
    content |= {out / FIGURES / name: png for name, png in drawn.items()}
    if (out / FIGURES).exists() and not (out / FIGURES).is_dir():
        raise ConfigError(f"--out needs the folder {str(out / FIGURES)!r}, which is a file; name another folder.")
    for path in content:
        check_own(path)
    for path, found in content.items():
        write_whole(path, found)
    return list(content)


def check_own(path: Path, kind: str = KIND) -> None:
    """Stop at a file that this command has not written.

    Args:
        path: of the file. kind: of its own JSON files.

    Raises:
        ConfigError: such a file.
    """
    if not path.exists():
        return
    try:
        own = path.is_file() and _is_own(path, kind)
    except (OSError, ValueError):
        own = False
    if not own:
        raise ConfigError(
            f"--out would replace {str(path)!r}, which this command has not written; name another folder."
        )


def _is_own(path: Path, kind: str) -> bool:
    content = path.read_bytes()
    if path.suffix == ".html":
        return f'<meta name="generator" content="{GENERATOR}"'.encode() in content[:4096]
    if path.suffix == ".json":
        found = json.loads(content)
        return isinstance(found, dict) and found.get("kind") == kind
    return content.startswith(b"\x89PNG") and b"Software\0" + SOFTWARE.encode() in content[:4096]
