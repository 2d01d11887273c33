"""``vgs check``: everything that can be known about a run before a GPU is needed, as a report."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..data.checks import bad_rows
from ..errors import ConfigError, in_one_line
from .preflight import STAGES, Preflight
from .resolved import training_arguments

SHOWN = 20  # bad rows that are listed


@dataclasses.dataclass
class Finding:
    """A stage's outcome.

    Attributes:
        stage: its name. outcome: ``"ok"``, ``"warning"``, ``"error"`` or ``"not checked"``. notes: sentences.
        rows: numbers of the rows that cannot be used.
    """

    stage: str
    outcome: str = "ok"
    notes: list[str] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)


class _Collector(logging.Handler):
    """Keeps what is logged as a warning, in place of stderr."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def _collected() -> Iterator[list[str]]:
    """Warnings of the package inside, which go into the report alone."""
    logger, collector = logging.getLogger("vgs"), _Collector()
    handlers, logger.handlers, propagate = logger.handlers, [collector], logger.propagate
    logger.propagate = False
    try:
        yield collector.messages
    finally:
        logger.handlers, logger.propagate = handlers, propagate


def check(config: Mapping[str, Any], progress: bool = True) -> list[Finding]:
    """Go through all stages of a run's start; a stage that fails does not keep others from being checked.

    Args:
        config: of ``load_config``.
        progress: show bars.

    Raises:
        ConfigError: the settings themselves are wrong.
    """
    import torch

    with _collected() as messages:
        args = training_arguments(config, **({} if torch.cuda.is_available() else {"use_cpu": True}))
    settings = Finding("settings", "warning" if messages else "ok", list(messages))
    run, found = Preflight(config, args, progress), [settings]
    for name, method in STAGES.items():
        finding = Finding(name)
        found.append(finding)
        with _collected() as messages:
            try:
                if needs := _missing(run, method):
                    finding.outcome = "not checked"
                    finding.notes.append(f"needs {needs}")
                elif method == "check_data_rows":
                    _check_rows(run, finding)
                else:
                    getattr(run, method)()
            except ConfigError as error:
                finding.outcome = "error"
                finding.notes.append(in_one_line(error))
        finding.notes += messages
        if messages and finding.outcome == "ok":
            finding.outcome = "warning"
        finding.notes += _facts(run, method) if finding.outcome in ("ok", "warning") else []
    return found


def _missing(run: Preflight, method: str) -> str | None:
    """What a stage lacks because an earlier one has failed."""
    if run.digits:
        return None
    if method in ("check_teacher", "check_forward", "measure_prompts") and run.processor is None:
        return "the student's processor"
    if method in ("check_data_rows", "measure_prompts", "count_steps") and "train" not in run.samples:
        return "the data"
    return None


def _check_rows(run: Preflight, finding: Finding) -> None:
    """All bad rows by number, of which training would name the first few."""
    for part, samples in list(run.samples.items()):
        problems = bad_rows(samples, run.processor, run.progress)
        finding.rows += [problem.row for problem in problems]
        word = "skipped" if samples.source.on_bad_row == "skip" else "cannot be used"
        finding.notes += [f"data.{part} {word}: {problem}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            finding.notes.append(f"data.{part}: and {len(problems) - SHOWN} more rows")
    run.check_data_rows()


def _facts(run: Preflight, method: str) -> list[str]:
    """What a stage has found where nothing is wrong."""
    if method == "open_data":
        return [f"data.{part}: {len(samples)} rows of {samples.source.path}" for part, samples in run.samples.items()]
    if method == "measure_prompts" and run.longest:
        return [f"the longest prompt has {run.longest} tokens"]
    if method == "count_steps" and run.steps:
        steps = run.steps
        return [f"{steps.total} optimizer steps, {steps.prompts} prompts each, {steps.batches} batches in an epoch"]
    return []


def text(findings: list[Finding]) -> str:
    """The report for people."""
    lines = []
    for finding in findings:
        notes = finding.notes or [""]
        lines.append(f"{finding.outcome:<11} {finding.stage}: {notes[0]}".rstrip(": ").rstrip())
        lines += [f"{'':<11}   {note}" for note in notes[1:]]
    errors = sum(finding.outcome == "error" for finding in findings)
    warnings = sum(finding.outcome == "warning" for finding in findings)
    lines.append(f"{errors} errors, {warnings} warnings." if errors or warnings else "Everything fits.")
    return "\n".join(lines)


def run(config: Mapping[str, Any], as_json: bool) -> int:
    """The command: prints the report; returns the exit status, 2 where there is an error.

    Args:
        config: of ``load_config``.
        as_json: print one JSON object: ``ok`` and ``findings``.

    Raises:
        ConfigError: the settings themselves are wrong.
    """
    findings = check(config, progress=not as_json)
    failed = any(finding.outcome == "error" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}))
    else:
        print(text(findings))
    return 2 if failed else 0
