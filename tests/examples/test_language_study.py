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
    found, rows = FOUND["terms"]["nats"], []
    for name in found:
        sign = "+" if " - " in name else ""
        for place, part in ((-1, "all tokens"), (-2, "highest fifth")):
            rows.append(row(name, part, *(interval(found[name][term][place], sign) for term in TERMS)))
    return rows


def log_rows() -> list[str]:
    rows, ends = [], range(4, 25, 4)
    for name, log in FOUND["logs"].items():
        for term in ("standard", "language", "gamma_effective"):
            if log[0].get(term) is not None:
                shown = "gamma" if term == "gamma_effective" else term
                rows.append(row(name, shown, *(f"{fmean(x[term] for x in log[end - 4 : end]):.2f}" for end in ends)))
    return rows


def parts_rows() -> list[str]:
    rows, batches = [], FOUND["parts"]
    for name in batches[0]:
        cells = [
            f"{fmean(x):.0f} ({min(x):.0f} to {max(x):.0f})" if x else ""
            for x in (
                [x[name][f"to {other}"] for x in batches if f"to {other}" in x[name]] for other in ("plain", "vgs")
            )
        ]
        length = [x[name]["norm"] / x["plain"]["norm"] for x in batches]
        rows.append(row(name, *cells, f"{fmean(length):.1f}"))
    return rows


def test_every_row_of_the_page_is_measured() -> None:
    expected = [*geometry_rows(), *parts_rows(), *terms_rows(), *log_rows()]
    assert [line for line in expected if line not in PAGE] == []
    tables = [line for line in PAGE.splitlines() if line.startswith("|")]
    heads = 2 * sum(line.startswith("| ---") for line in tables)
    assert heads == 8 and len(tables) - heads == len(expected)


if __name__ == "__main__":
    print("\n\n".join("\n".join(rows) for rows in (geometry_rows(), parts_rows(), terms_rows(), log_rows())))
