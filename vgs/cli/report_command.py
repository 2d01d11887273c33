"""``vgs report``: runs side by side, as one page, pictures and numbers."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from .output import check_folder

logger = logging.getLogger(__name__)

OUT = Path("runs/report")


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of the command.

    Args:
        command: its parser.
    """
    command.add_argument("runs", nargs="+", metavar="RUN", help="folders of `vgs train`, `vgs demo` or `vgs study`")
    command.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder of the report ({OUT})")
    command.add_argument("--title", help="of the page (the names of the arms)")


def run(options: argparse.Namespace) -> int:
    """The command; returns the exit status.

    Args:
        options: ``runs``, ``out`` and ``title`` of the command line.

    Raises:
        ConfigError: a folder that is no run or has no log, or a file that is not this command's to replace.
    """
    from ..reports.collect import collect
    from ..reports.runs import read_runs
    from ..reports.write import write_report

    numbers = collect(read_runs(options.runs))  # before anything is written
    check_folder(options.out)
    title = options.title or " · ".join(arm["name"] for arm in numbers["arms"])
    written = write_report(numbers, options.out, title)
    shown = [path for path in written if path.suffix != ".png"]
    pictures = len(written) - len(shown)
    print(f"{', '.join(map(str, shown))}, {pictures} pictures in {options.out / 'figures'}")
    return 0
