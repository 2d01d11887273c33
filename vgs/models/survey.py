"""Which families run how: the self-check over all that ``AutoModelForImageTextToText`` can load, as a page of the docs.

    python -m vgs.models.survey --out docs/families.md

A tiny random model of every family, from its default config, is asked as ``vgs.models.self_check`` asks a model at the
start of a run. Nothing depends on the page: a run asks its own model.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from .agreement import Agreement
from .self_check import check_groups, examine
from .survey_models import SURVEYED, picture_groups, text_groups, tiny_config

SECONDS, BYTES = 120, 8 * 2**30  # what one family may take


@dataclass(frozen=True)
class Entry:
    """One family's line.

    Attributes:
        family: its ``model_type``. text: that of its text stack.
        way: of ``self_check.WAYS``, or None.
        picture: whether it was tried with a picture.
        states, gradients: of the way.
        note: why it is not packed, or was tried without a picture, or could not be tried.
    """

    family: str
    text: str
    way: str | None
    picture: bool
    states: float | None
    gradients: float | None
    note: str


def survey_family(family: str) -> Entry:
    """Ask one family.

    Args:
        family: of ``SURVEYED``.
    """
    notes, picture, text = [], True, ""
    try:
        config = tiny_config(family)
        text = config.get_text_config().model_type
        model_class = getattr(transformers, SURVEYED[family])
        try:
            groups = picture_groups(family, model_class, config)
        except Exception as error:  # whatever a family's code raises
            notes.append(f"without a picture, {_short(error)}")
            groups, picture = text_groups(), False
        found = examine(model_class, config, check_groups(groups), torch.device("cpu"))
    except Exception as error:
        return Entry(family, text, None, False, None, None, f"no tiny model: {_short(error)}")
    if found.error:
        return Entry(family, text, None, picture, None, None, f"not tried: {found.error}")
    notes += [f"{name}: {agreement}" for name, agreement in found.ways.items() if not agreement.exact]
    best = found.ways.get(found.way) or Agreement(None, None)
    return Entry(family, text, found.way, picture, best.states, best.gradients, "; ".join(notes))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _child(family: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    answer.send(asdict(survey_family(family)))


def survey(families: Sequence[str]) -> list[Entry]:
    """Ask families, each in a process of its own with a limit of time and memory.

    Args:
        families: of ``SURVEYED``.
    """
    context, entries = multiprocessing.get_context("fork"), []
    for family in families:
        ours, theirs = context.Pipe()
        process = context.Process(target=_child, args=(family, theirs))
        process.start()
        theirs.close()
        try:
            done = ours.poll(SECONDS)
            entry = Entry(**ours.recv()) if done else None
        except EOFError:
            entry = None
        process.kill()
        process.join()
        limit = f"not tried: more than {SECONDS} s or {BYTES // 2**30} GiB"
        entries.append(entry or Entry(family, "", None, False, None, None, limit))
        print(f"{entries[-1].family:<24} {entries[-1].way or '-':<7} {entries[-1].note}", flush=True)
    return entries


def page(entries: Sequence[Entry]) -> str:
    """The entries as Markdown.

    Args:
        entries: of ``survey``.
    """
    packed = [entry for entry in entries if entry.way == "packed"]
    padded = [entry for entry in entries if entry.way not in ("packed", None)]
    rest = [entry for entry in entries if entry.way is None]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    lines = [
        "# Model families",
        "",
        "Written by `python -m vgs.models.survey --out docs/families.md`; do not edit. "
        f"{datetime.date.today().isoformat()}, {versions}, on a CPU.",
        "",
        "Every run asks its own student and teacher at its start how they may be run: packed rows with shared prompts, "
        "and if these are not exact, padded batches, against one plain forward for each sequence. Here the same "
        f"question is put to a tiny random model of each of the {len(entries)} families that "
        "`AutoModelForImageTextToText` of transformers can load. Nothing depends on this page.",
        "",
        "*States* and *gradients* are the largest differences from the plain forward, relative to the largest entry, "
        "in float32. *Picture* says whether the prompt had one: a tiny model's picture comes from the family's image "
        "processor with its default settings, which does not fit in every case; a run asks with its own processor.",
        "",
        f"- packed: {len(packed)} families",
        f"- padded: {len(padded)}",
        f"- neither, or not tried: {len(rest)}",
        "",
    ]
    for title, part in (("Packed", packed), ("Padded", padded)):
        lines += [f"## {title}", "", "| family | text stack | picture | states | gradients | note |", "| - " * 6 + "|"]
        for x in part:
            numbers = f"{x.states:.0e} | {x.gradients:.0e}"
            lines.append(f"| {x.family} | {x.text} | {'yes' if x.picture else 'no'} | {numbers} | {_cell(x.note)} |")
        lines.append("")
    lines += ["## Neither, or not tried", "", "| family | text stack | why |", "| - | - | - |"]
    lines += [f"| {x.family} | {x.text} | {_cell(x.note)} |" for x in rest]
    return "\n".join(lines) + "\n"


def _cell(note: str) -> str:
    return note.replace("|", "/").replace("<", "&lt;")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m vgs.models.survey", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the page; without it, lines on the screen alone")
    parser.add_argument("--json", type=Path, help="where to write the entries")
    parser.add_argument("families", nargs="*", help="some families; without any, all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    transformers.logging.set_verbosity_error()
    entries = survey(arguments.families or list(SURVEYED))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text(page(entries))


if __name__ == "__main__":
    main()
