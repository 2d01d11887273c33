"""What docs/study-language.md says is what docs/studies/language.json holds."""

from __future__ import annotations

import json
from statistics import fmean

from documents import ROOT

PAGE = (ROOT / "docs/study-language.md").read_text()
FOUND = json.loads((ROOT / "docs/studies/language.json").read_text())
TERMS = ("standard", "visual", "language")


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def interval(values: list[float], sign: str = "") -> str:
    """A mean with the ends of its interval."""
    mean, low, high = (f"{value:{sign}.3f}" for value in values)
    return f"{mean} ({low} to {high})"


def geometry_rows() -> list[str]:
    found, rows = FOUND["geometry"]["parameters"], []
    for number, vds in enumerate([*FOUND["geometry"]["vds"], None]):
        name = "all" if vds is None else str(number + 1)
        angles, norms = (
            {k: x if vds is None else x[number] for k, x in (found["all"] if vds is None else found)[kind].items()}
            for kind in ("angles", "norms")
        )
        cells = [f"{angles[pair]:.0f}" for pair in ("language-visual", "standard-visual", "standard-language")]
        cells += [f"{norms[term]:.0f}" for term in TERMS]
        rows.append(row(name, "" if vds is None else f"{vds:.2f}", *cells))
    return rows


def terms_rows() -> list[str]:
    rows = []
    for name, sign in (("student", ""), ("plain", ""), ("vgs", ""), ("vgs - plain", "+")):
        for place, part in ((-1, "all tokens"), (-2, "highest fifth")):
            cells = [interval(FOUND["terms"]["nats"][name][term][place], sign) for term in TERMS]
            rows.append(row(name, part, *cells))
    return rows


def log_rows() -> list[str]:
    rows = []
    for name, log in FOUND["logs"].items():
        for term in ("standard", "language"):
            parts = [[entry[term] for entry in log[first:last]] for first, last in ((0, 4), (4, 8), (8, 12), (12, 16))]
            rows.append(row(name, term, *(f"{fmean(part):.2f}" if len(part) == 4 else "not run" for part in parts)))
    return rows


def test_every_row_of_the_page_is_measured() -> None:
    expected = [*geometry_rows(), *terms_rows(), *log_rows()]
    assert [line for line in expected if line not in PAGE] == []
    tables = [line for line in PAGE.splitlines() if line.startswith("|")]
    heads = 2 * sum(line.startswith("| ---") for line in tables)
    assert heads == 6 and len(tables) - heads == len(expected)


if __name__ == "__main__":
    print("\n".join([*geometry_rows(), "", *terms_rows(), "", *log_rows()]))
