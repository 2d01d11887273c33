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
import re
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import transformers

from .agreement import in_words
from .self_check import check_groups, examine
from .survey_models import SURVEYED, picture_groups, text_groups, tiny_config
from .survey_tables import REASONS

SECONDS, BYTES = 120, 8 * 2**30  # what one family may take


@dataclass(frozen=True)
class Entry:
    """One family's line.

    Attributes:
        family: its ``model_type``. text: that of its text stack.
        way: of ``self_check.WAYS``, or None.
        picture: whether it was tried with a picture.
        states, gradients: of the way.
        why: in words, why it is not packed, or could not be tried.
        unseen: in words, why it was tried without a picture.
        refused: whether it was tried, and runs in neither way.
        details: errors and numbers as they came.
    """

    family: str
    text: str = ""
    way: str | None = None
    picture: bool = False
    states: float | None = None
    gradients: float | None = None
    why: str = ""
    unseen: str = ""
    refused: bool = False
    details: str = ""


def survey_family(family: str) -> Entry:
    """Ask one family.

    Args:
        family: of ``SURVEYED``.
    """
    entry, details = Entry(family), []
    try:
        config = tiny_config(family)
        entry = replace(entry, text=config.get_text_config().model_type)
        if getattr(config, "is_encoder_decoder", False):
            return replace(entry, why="an encoder reads the prompt, a decoder writes: they are not one sequence")
        model_class = getattr(transformers, SURVEYED[family])
        try:
            groups = picture_groups(family, model_class, config)
            entry = replace(entry, picture=True)
        except Exception as error:  # whatever a family's code raises
            groups, details = text_groups(), [in_words(error)]
            entry = replace(entry, unseen=_plain(details[0]))
        found = examine(model_class, config, check_groups(groups), torch.device("cpu"))
    except Exception as error:
        return replace(entry, why=REASONS.get(family) or _plain(in_words(error)), details=in_words(error))
    if found.error:
        why = REASONS.get(family) or _plain(found.error)
        return replace(entry, why=why, details="; ".join([*details, found.error]))
    details += [f"{name}: {agreement}" for name, agreement in found.ways.items() if not agreement.exact]
    entry = replace(entry, way=found.way, refused=found.way is None, details="; ".join(details))
    if found.way != "packed":
        other = [agreement for agreement in found.ways.values() if not agreement.exact][-1]
        entry = replace(entry, why=REASONS.get(family) or _plain(str(other)))
    if best := found.ways.get(found.way):
        entry = replace(entry, states=best.states, gradients=best.gradients)
    return entry


#: Parts of what is raised, or found -> what it means.
_WORDS = (
    (r"requires the (\w+) library", r"it needs the package \1, which was not installed"),
    (r"(pixel_values|flattened_patches)", "it does not run without a picture: it has no text-only view"),
    (r"no output head|get_input_embeddings", "it has no table of tokens, or no head, as language models have"),
    (r"has no get_image_features", "it takes pictures in by a way of its own"),
    (r"names no image token", "no token stands for its pictures"),
    (r"has no image processor", "the library has no image processor for it"),
    (r"^ValueError: \w+ returns (.*)", r"its image processor returns other fields: \1"),
    (r"Processor.*'Tensor' object has no attribute 'items'", "its image processor returns no fields"),
    (r"missing \d required positional arguments?: (.*)", r"it needs more than tokens and pictures: \1"),
    (r"(states differ by \S+)", r"\1 of the largest"),
)


def _plain(message: str) -> str:
    """An error, or a disagreement, in words; as it came where there are none for it."""
    for pattern, words in _WORDS:
        if found := re.search(pattern, message):
            return found.expand(words)
    return message


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
        limit = f"it took more than {SECONDS} s or {BYTES // 2**30} GiB"
        entries.append(entry or Entry(family, why=limit))
        print(f"{family:<24} {entries[-1].way or '-':<7} {entries[-1].details or entries[-1].why}", flush=True)
    return entries


def page(entries: Sequence[Entry]) -> str:
    """The entries as Markdown.

    Args:
        entries: of ``survey``.
    """
    packed = [entry for entry in entries if entry.way == "packed"]
    padded = [entry for entry in entries if entry.way not in ("packed", None)]
    refused = [entry for entry in entries if entry.refused]
    rest = [entry for entry in entries if entry.way is None and not entry.refused]
    unseen = [entry for entry in entries if entry.way and not entry.picture]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch"))
    counts = f"{len(packed)} run in packed rows, {len(padded)} in padded batches; {len(refused)} in neither"
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
        f"{counts}; {len(rest)} were not tried. {len(unseen)} of those that run were tried with text alone.",
        "",
        "*States* and *gradients* are the largest differences from the plain forward, relative to the largest entry, "
        "in float32; rounding makes 1e-7 to 1e-4.",
        "",
        "## Packed rows",
        "",
        "Each prompt and its pictures run once for all responses, without padding.",
        "",
        "| family | text stack | picture | states | gradients |",
        "| - | - | - | - | - |",
        *(_row(x, *_tried(x)) for x in packed),
        "",
        "## Padded batches",
        "",
        "Exact, but slower: packed rows are not.",
        "",
        "| family | text stack | picture | states | gradients | why not packed |",
        "| - | - | - | - | - | - |",
        *(_row(x, *_tried(x), x.why) for x in padded),
        "",
    ]
    for title, part in (("Refused: exact in neither way", refused), ("Not tried", rest)):
        table = ["| family | why |", "| - | - |", *(_row(x, x.why) for x in part)] if part else ["None."]
        lines += [f"## {title}", "", *table, ""]
    lines += ["## Tried with text alone", "", "| family | why |", "| - | - |", *(_row(x, x.unseen) for x in unseen)]
    return "\n".join(lines) + "\n"


def _tried(entry: Entry) -> tuple[str, ...]:
    picture = "yes" if entry.picture else "no"
    return entry.text, picture, f"{entry.states:.0e}", f"{entry.gradients:.0e}"


def _row(entry: Entry, *cells: str) -> str:
    return " | ".join(["| " + entry.family, *(cell.replace("|", "/").replace("<", "&lt;") for cell in cells)]) + " |"


def make_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="python -m vgs.models.survey", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="where to write the page; without it, lines on the screen alone")
    parser.add_argument("--json", type=Path, help="where to write the entries")
    parser.add_argument("families", nargs="*", help="some families; without any, all")
    return parser


def main() -> None:
    """The command."""
    arguments = make_parser().parse_args()
    torch.set_num_threads(1)  # processes are forked
    transformers.logging.set_verbosity_error()
    entries = survey(arguments.families or list(SURVEYED))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(entry) for entry in entries], indent=1) + "\n")
    if arguments.out:
        arguments.out.write_text(page(entries))


if __name__ == "__main__":
    main()
