"""Messages that ``docs/troubleshooting.md`` quotes are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from documents import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ANYTHING = "…"
PERCENT = re.compile(r"%(?:\.\d+)?[sdrfg]|\{[^{}]*\}")  # what logging and str.format put in


def rendered(node: ast.AST) -> str | None:
    """A string of the code as a reader sees it, with an ellipsis for each value that is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return PERCENT.sub(ANYTHING, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(part) if isinstance(part, ast.Constant) else ANYTHING for part in node.values)
    return None


def messages() -> Iterator[str]:
    """All strings of both packages."""
    for package in ("vgs", "vgs_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if (text := rendered(node)) is not None:
                    yield " ".join(text.split())


MESSAGES = sorted(set(messages()), key=len)
QUOTES = re.findall(r"(?m)^> (.*)$", PAGE)


def is_said(quote: str) -> bool:
    """Whether the code has a message with these words in this order; neighbouring values count as one."""
    wanted = re.sub(f"{ANYTHING}+", ANYTHING, quote)
    return any(wanted in re.sub(f"{ANYTHING}+", ANYTHING, message) for message in MESSAGES)


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote[:50])
def test_a_quoted_message_is_in_the_code(quote: str) -> None:
    assert is_said(quote)


def test_each_has_a_cause_and_a_remedy() -> None:
    assert len(QUOTES) > 30 and len(QUOTES) == len(set(QUOTES))
    for quote, after in re.findall(r"(?m)^> (.*)\n\n(.*)$", PAGE):
        assert after[:1] not in ("", ">", "#"), f"nothing is said about {quote!r}"


@pytest.mark.parametrize(
    ("quote", "said"),
    [
        ("tools are not supported: a tool's reply has no text-only view.", True),
        ("output_dir … has … GiB free, one checkpoint takes ….", True),
        ("output_dir … has 3.0 GiB free", False),
        ("tools are supported", False),
    ],
)
def test_another_message_is_found_out(quote: str, said: bool) -> None:
    assert is_said(quote) is said
