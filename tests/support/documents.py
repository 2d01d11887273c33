"""The project's pages: their code blocks, commands, links and names, and whether each of these still holds."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import re
import runpy
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
PLACES = ("*.md", "docs/*.md", "docs/api/*.md", "benchmarks/*.md", "examples/*.md", "findings/*.md")
PAGES = [path for place in PLACES for path in sorted(ROOT.glob(place))]
NOTES = sorted(ROOT.glob("tests/**/*.md"))  # for those who change the tests: not read as pages, but their links hold
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
#: Words that stand for something, and what a test puts there.
PLACEHOLDERS = {
    "CONFIG": "configs/digits.yaml",
    "NAME": "vgs",
    "ADDRESS": "127.0.0.1",
    "R": "0",
    "N": "2",
    "8N": "16",
    "--setting": "--gamma",
    "value": "1",
}
PATHS = re.compile(r"(?:vgs|vgs_kernels|tests|docs|configs|benchmarks|examples)/[\w./-]*")
MODULES = re.compile(r"(?:vgs|vgs_kernels)(?:\.\w+)+")
SETTINGS = re.compile(r"(\w+): \S.*")


@dataclass(frozen=True)
class Block:
    """A piece of code on a page: a fenced block, or a span of code inside a sentence (language "inline")."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(text: str, page: str = "page.md") -> list[Block]:
    """All code of a page, in order."""
    found = [Block(page, text.count("\n", 0, match.start()) + 1, match[2], match[3]) for match in FENCE.finditer(text)]
    rest = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    rest = re.sub(r"(?m)^ {4,}.*$", "", rest)  # formulas
    spans = re.finditer(r"`([^`\n]+)`", rest)
    inline = [Block(page, rest.count("\n", 0, match.start()) + 1, "inline", match[1]) for match in spans]
    return sorted([*found, *inline], key=lambda block: block.line)


def all_blocks(language: str) -> list[Block]:
    """The blocks of one language on all pages."""
    pages = [(path.read_text(), str(path.relative_to(ROOT))) for path in PAGES]
    return [block for text, page in pages for block in blocks(text, page) if block.language == language]


def commands(text: str) -> list[list[str]]:
    """The command lines of a shell block as words, comments gone, placeholders filled in."""
    lines = text.replace("\\\n", " ").splitlines()
    split = (shlex.split(line, comments=True) for line in lines)
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in split if words]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures, code left out."""
    prose = re.sub(r"`[^`\n]+`", "", FENCE.sub("", text))
    yield from re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose)


def broken_link(target: str, page: Path) -> str | None:
    """What is wrong with a link on a page, if anything. Links to other sites are not followed."""
    if re.match(r"\w+:", target):
        return None
    name, _, anchor = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.exists():
        return f"{page.name}: no file {name}"
    if anchor and anchor not in {slug(heading) for heading in re.findall(r"(?m)^#+ (.*)$", path.read_text())}:
        return f"{page.name}: {path.name} has no heading #{anchor}"
    return None


def _said(parse: Callable[[], object]) -> str | None:
    """What a parser of arguments says on its way out; None if it is content."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
            parse()
    except SystemExit:
        return out.getvalue().strip().splitlines()[-1]
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _vgs(words: Sequence[str]) -> str | None:
    from vgs.cli.main import build_parser, load_config

    def parse() -> None:
        parser = build_parser()
        if len(words) == 1:
            words_and_help = [*words, "--help"]
            with contextlib.suppress(SystemExit), contextlib.redirect_stderr(errors := io.StringIO()):
                parser.parse_args(words_and_help)
            if errors.getvalue():
                raise ValueError(errors.getvalue().strip().splitlines()[-1])
            return
        options, rest = parser.parse_known_args(words)
        if hasattr(options, "config") and getattr(options, "benchmarks", None) is None:
            load_config(options.config, rest)
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")

    return _said(parse)


def _accelerate(words: Sequence[str]) -> str | None:
    from accelerate.commands.launch import launch_command_parser

    problem = _said(lambda: launch_command_parser().parse_args(words[1:]))
    if problem or words[0] != "launch":
        return problem or f"accelerate {words[0]} is not known here"
    options = launch_command_parser().parse_args(words[1:])
    if options.config_file and not Path(options.config_file).exists():
        return f"no file {options.config_file}"
    if not options.module and options.training_script.startswith("examples/"):
        return _python([options.training_script])
    if (options.module, options.training_script) != (True, "vgs.cli"):
        return f"starts {options.training_script}, expected -m vgs.cli"
    return _vgs(options.training_script_args)


def extras() -> set[str]:
    """The extras that setup.py offers."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return set(setup.call_args.kwargs["extras_require"])


def _pytest(words: Sequence[str]) -> str | None:
    markers = re.findall(r'^ +"(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = words[words.index("-m") + 1] if "-m" in words else None
    if named not in (None, *markers):
        return f"no marker {named}"
    missing = [word for word in words if "/" in word and not (ROOT / word).exists()]
    return f"no file {missing[0]}" if missing else None


def _python(words: Sequence[str]) -> str | None:
    if words[:2] == ["-m", "benchmarks"]:
        from benchmarks.__main__ import _parser

        return _said(lambda: _parser().parse_args(words[2:]))
    if words[:2] == ["-m", "vgs.models.survey"]:
        from vgs.models.survey import make_parser

        return _said(lambda: make_parser().parse_args(words[2:]))
    if words[:2] == ["-m", "pytest"]:
        return _pytest(words[2:])
    if words[0] == "-m" and words[1].startswith("vgs.integrations.") and len(words) == 2:
        return None if importlib.util.find_spec(words[1]) else f"no module {words[1]}"
    if words[0] == "-m":
        return f"python -m {words[1]} is not known here"
    return None if (ROOT / words[0]).exists() else f"no file {words[0]}"


def _make(words: Sequence[str]) -> str | None:
    targets = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text())
    missing = [word for word in words if word not in targets]
    return f"make has no target {missing[0]}" if missing else None


def _pip(words: Sequence[str]) -> str | None:
    named = re.findall(r"\w+", " ".join(re.findall(r"\.\[(.*?)\]", " ".join(words))))
    missing = set(named) - extras()
    return f"no extra {missing.pop()}" if missing else None


def _bash(words: Sequence[str]) -> str | None:
    return None if (ROOT / words[0]).exists() else f"no file {words[0]}"


PROGRAMS = {"vgs": _vgs, "accelerate": _accelerate, "python": _python, "make": _make, "pip": _pip, "bash": _bash}


def broken_command(words: Sequence[str]) -> str | None:
    """What is wrong with a command line, by the parser of the program itself; None if nothing is."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a variable of the environment
        words = words[1:]
    if words[0] not in PROGRAMS:
        return f"{words[0]} is a program that no test knows"
    problem = PROGRAMS[words[0]](list(words[1:]))
    return f"{' '.join(words)}: {problem}" if problem else None


def known_settings() -> set[str]:
    """Every key that a config may have, in any section and with any trainer, one of accelerate's included."""
    import yaml

    from vgs.cli import keys as tables
    from vgs.data.sources import DataSource
    from vgs.trainers.kinds import TRAINERS
    from vgs_kernels import Divergence

    keys = {*tables.TOP, *tables.SECTIONS, *tables.TEACHER, *tables.DIGITS, *tables.lora_keys()}
    for settings in (DataSource, Divergence, *(load()[0] for load in TRAINERS.values())):
        keys |= {field.name for field in dataclasses.fields(settings)}
    for path in (ROOT / "configs" / "accelerate").glob("*.yaml"):
        launch = yaml.safe_load(path.read_text())
        keys |= {*launch, *launch.get("fsdp_config", {}), *launch.get("deepspeed_config", {})}
    return keys


def broken_name(span: str) -> str | None:
    """What is wrong with a span of code that names a file, a module or a setting of this project."""
    if PATHS.fullmatch(span):
        return None if (ROOT / span).exists() else f"no file {span}"
    if MODULES.fullmatch(span):
        name, attributes = span, []
        while name:
            try:
                thing = importlib.import_module(name)
                break
            except ModuleNotFoundError:
                name, _, last = name.rpartition(".")
                attributes.insert(0, last)
        for attribute in attributes:
            if not hasattr(thing, attribute):
                return f"no module or name {span}"
            thing = getattr(thing, attribute)
        return None
    if (match := SETTINGS.fullmatch(span)) and match[1] not in known_settings():
        return f"no setting {match[1]}"
    return None
