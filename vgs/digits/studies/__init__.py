"""Studies on the built-in task: several seeds, intervals, a results.json and a picture each."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

STUDIES = {
    "grpo": "GRPO alone, with plain distillation and with VGS",
    "self-distillation": "self-distillation with clean digits, labels or noise as privileged context",
}


def add_parser(commands: Any) -> None:
    """Add ``vgs study`` to the subcommands of a command line."""
    about = "; ".join(f"{name}: {text}" for name, text in STUDIES.items())
    command = commands.add_parser(
        "study", help="compare methods over seeds on handwritten digits", description=about, allow_abbrev=False
    )
    command.add_argument("study", choices=STUDIES)
    command.add_argument("--out", type=Path, help="folder for results.json and a picture (runs/study-NAME)")
    command.add_argument("--cache", type=Path, help="folder for trained models (~/.cache/vgs)")
    command.add_argument("--quick", action="store_true", help="seconds, to see that everything runs")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The command; returns what results.json holds."""
    module = import_module(f"{__name__}.{options.study.replace('-', '_')}")
    out = options.out or Path("runs") / f"study-{options.study}"
    return module.run_study(out, options.cache, options.quick)
