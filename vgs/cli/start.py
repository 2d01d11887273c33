"""The command's first lines, before anything is imported that may not be installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

PACKAGE = "vgs-kernels"
EXTRA = "train"  # what the command needs beside torch
SHOWN = ("torch", "triton", "transformers", "trl")


def missing_packages() -> list[str]:
    """Packages of the extra ``train`` that are not installed; of a checkout that is not installed, none is known."""
    try:
        needed = requires(PACKAGE) or []
    except PackageNotFoundError:
        return []
    lines = [line for line in needed if re.search(rf"extra == ['\"]{EXTRA}", line)]
    names = dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in lines)  # some have two bounds
    return [name for name in names if _version(name) is None]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _install() -> str:
    missing = missing_packages()
    return f"needs {', '.join(missing)}: pip install '{PACKAGE}[{EXTRA}]'" if missing else ""


def version_line() -> str:
    """This package's version and those of the libraries below it; and what the command still needs, if anything."""
    from vgs_kernels import __version__

    beside = ", ".join(f"{name} {found}" for name in SHOWN if (found := _version(name)))
    lacks = _install()
    return f"vgs {__version__} ({beside})" + (f"; training {lacks}" if lacks else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the ``vgs`` command; returns the exit status of ``vgs.cli.main``.

    Args:
        arguments: of the command line; None: this process's.

    Raises:
        SystemExit: with status 2, after one sentence on stderr, where a package is missing; as ``vgs.cli.main``.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given == ["--version"]:
        print(version_line())
        return 0
    if lacks := _install():
        print(f"vgs: error: the command {lacks}", file=sys.stderr)
        raise SystemExit(2)
    from .main import main as run

    return run(given)
