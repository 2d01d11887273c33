"""What docs/study.md says is what docs/studies/steering.json holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean

from documents import ROOT

PAGE = (ROOT / "docs/study.md").read_text()
FOUND = json.loads((ROOT / "docs/studies/steering.json").read_text())
STUDENTS = {cell["student"]: cell for cell in FOUND["before"]}
ROWS = {(row["student"], row["arm"]): row for row in FOUND["summary"]}
PARTS = [arm for student, arm in ROWS if ("weak", arm) not in ROWS]


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def points(values: Sequence[float]) -> str:
    """A difference in points with the ends of its interval."""
    mean, low, high = (f"{100 * value:+.1f}" for value in values)
    return f"{mean} ({low} to {high})"


def nats(values: Sequence[float]) -> str:
    """A difference in nats per token with the ends of its interval."""
    mean, low, high = (f"{value:+.3f}" for value in values)
    return f"{mean} ({low} to {high})"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def rate(student: str, arm: str) -> str:
    rates = {(x["student"], x["arm"]): x["rate"] for x in FOUND["rates"]}
    return f"{rates.get((student, arm), rates[student, 'gamma 2']):g}"


def outcome(student: str, arm: str) -> list[str]:
    found = ROWS[student, arm]
    shares = [percent(found["answers"]), percent(found["digits"])]
    return [*shares, points(found["gain"]), points(found["digits_gain"]), percent(found["collapsed"])]


def phase_rows() -> list[str]:
    rows = []
    for student, before in STUDENTS.items():
        shares = [percent(before["test"][x]) for x in ("answers", "digits")]
        rows.append(row(student, "before", "", *shares, "", "", ""))
        arms = [arm for name, arm in ROWS if name == student and arm not in PARTS]
        rows += [row(student, arm, rate(student, arm), *outcome(student, arm)) for arm in sorted(arms, key=order)]
    return rows


def order(arm: str) -> int:
    return [*FOUND["settings"]["arms"], "supervised"].index(arm)


def part_rows() -> list[str]:
    return [row(arm, *outcome(FOUND["middle"], arm)) for arm in PARTS]


def geometry_rows() -> list[str]:
    rows = []
    for student, before in STUDENTS.items():
        found = before["geometry"]["parameters"]
        for part in ("all tokens", "lowest half", "highest fifth"):
            angles = found["all"]["angles"] if part == "all tokens" else found["angles"]
            norms = found["all"]["norms"] if part == "all tokens" else found["norms"]
            chosen = {"all tokens": None, "lowest half": slice(0, 5), "highest fifth": slice(-2, None)}[part]
            pairs = ("language-visual", "standard-visual", "standard-language")
            cells = [of(angles[pair], chosen, 0) for pair in pairs]
            cells += [of(norms[term], chosen, 2) for term in ("standard", "visual", "language")]
            rows.append(row(student, part, *cells))
    return rows


def of(values: float | Sequence[float], chosen: slice | None, digits: int) -> str:
    """A number, or the mean over bins."""
    return f"{values if chosen is None else fmean(values[chosen]):.{digits}f}"


def term_rows() -> list[str]:
    rows = []
    for student in STUDENTS:
        for arm in ("gamma 1", "gamma 2", "gamma 2, guarded", "gamma 2, frozen prior"):
            found = ROWS[student, arm]["terms"]
            cells = [found["visual"]["low"], found["visual"]["high"], found["language"]["all"]]
            rows.append(row(student, arm, *map(nats, cells)))
    return rows


def all_rows() -> list[list[str]]:
    return [phase_rows(), part_rows(), geometry_rows(), term_rows()]


def test_every_row_of_the_page_is_measured() -> None:
    expected = [line for rows in all_rows() for line in rows]
    assert [line for line in expected if line not in PAGE] == []
    tables = [line for line in PAGE.splitlines() if line.startswith("|")]
    heads = 2 * sum(line.startswith("| ---") for line in tables)
    assert len(tables) - heads == len(expected)


if __name__ == "__main__":
    print("\n\n".join("\n".join(rows) for rows in all_rows()))
