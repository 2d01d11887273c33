"""Result files as text: markdown tables, and one run against another. Ratios are always within one run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .jobs import JOBS
from .methods import FLOOR, METHODS, TOLERANT
from .results import Results, Row, median, percentiles, worst_error


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def size(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.0f} MiB"


def title(method: str) -> str:
    return "floor" if method == FLOOR else METHODS[method].title if method in METHODS else method


def _percent(row: Row) -> str:
    error = worst_error(row)
    return "" if error is None else f"{100 * error:.2g} %"


def _line(row: Row, floor: float | None, eager: float | None) -> list[str]:
    own = median(row)
    if own is None:
        return [title(row["method"]), row["status"], *[""] * 4]
    low, high = percentiles(row["seconds"])
    peak = row["peak_extra_bytes"]
    return [
        title(row["method"]),
        f"{duration(own)} ({duration(low)}-{duration(high)})",
        f"{own / floor:.2f}" if floor else "",
        f"{own / eager:.2f}" if eager else "",
        "" if peak is None else size(peak),
        _percent(row),
    ]


def _rows(row: Row) -> str:
    source = f" ({row['rows']})" if "rows" in row else ""
    return f", rows of {row['entropy']:.2g} nats{source}" if "entropy" in row else ""


def _conditions(environment: dict) -> str:
    """What is unlike a quiet machine and warm calls."""
    said = ""
    if (load := environment.get("load")) is not None:
        share = "" if load["share"] is None else f" (which had {load['share']:.2f} of it)"
        said += f"; one core kept busy by another process{share}"
    if (caches := environment.get("disk_caches")) is not None:
        files = ", ".join(f"{name} {count}" for name, count in caches.items())
        said += f"; first calls of fresh processes (files in caches on disk before: {files})"
    return said


def describe(environment: dict) -> str:
    """One line: where and with what."""
    device = environment.get("device_name") or f"{environment['processor']}, {environment['threads']} threads"
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    commit = (environment["commit"] or "unknown")[:9] + {True: " and changes", None: " or later"}.get(
        environment["uncommitted_changes"], ""
    )
    return (
        f"{device}; {packages}; Python {environment['python']}; commit {commit}; {environment['date']}"
        + _conditions(environment)
    )


def tables(results: Results) -> str:
    """Every cell as a table."""
    parts = []
    for (shape, tokens, dtype, job), rows in results.cells():
        floor, eager = (median(rows.get(name)) for name in (FLOOR, "eager"))
        sizes = next(iter(rows.values()))
        parts.append(
            f"**{JOBS[job].title}**: {shape} (V {sizes['vocab']:,}, Ds {sizes['student']:,}, Dt {sizes['teacher']:,}), "
            f"N {tokens:,}, {dtype}{_rows(sizes)}; gradients {size(sizes['gradient_bytes'])}"
            f"{_conditions(results.environment)}"
        )
        header = ["method", "median (p20-p80)", "x floor", "x eager", "peak extra memory", "gradient error"]
        parts.append(table(header, [_line(row, floor, eager) for row in rows.values()]))
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """Where it was measured, every cell as a table, and what is missing."""
    parts = [describe(results.environment), tables(results)]
    missing = results.environment.get("missing", {})
    if missing:
        parts.append("Missing: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + ".")
    return "\n\n".join(parts)


def summary(results: Results) -> str:
    """One line a cell: how close to the floor, how far from the best peer."""
    lines = []
    for (shape, tokens, _, job), rows in results.cells():
        floor, ours = (median(rows.get(name)) for name in (FLOOR, "ours"))
        if ours is None:
            lines.append([shape, f"{tokens:,}", job, rows.get("ours", {}).get("status", "not measured"), *[""] * 4])
            continue
        peers = {name: median(row) for name, row in rows.items() if name in METHODS}
        others = ("ours", *TOLERANT, *(name for name in METHODS if not METHODS[name].same_loss))
        peers = {name: time for name, time in peers.items() if name not in others and time is not None}
        best = min(peers, key=peers.get) if peers else None
        peak, error = rows["ours"]["peak_extra_bytes"], _percent(rows[best]) if best else ""
        lines.append(
            [
                *(shape, f"{tokens:,}", job, duration(ours)),
                f"{floor / ours:.2f}" if floor else "",
                f"{peers[best] / ours:.2f} ({best}{', error ' * bool(error)}{error})" if best else "",
                "" if peak is None else size(peak),
                _percent(rows["ours"]),
            ]
        )
    header = ["shape", "N", "job", "ours", "floor/ours", "best peer/ours", "peak extra", "gradient error"]
    return table(header, lines)


def compare(before: Results, after: Results) -> str:
    """Times as multiples of each run's own floor, so that different machines and days can be compared."""
    old, new = dict(before.cells()), dict(after.cells())
    lines, alone = [], 0
    for key in (*old, *(key for key in new if key not in old)):
        rows = old.get(key, {}), new.get(key, {})
        floors = [median(side.get(FLOOR)) for side in rows]
        for method in (*rows[0], *(name for name in rows[1] if name not in rows[0])):
            if method == FLOOR:
                continue
            pair = [side.get(method) for side in rows]
            if None in pair:
                alone += 1
                continue
            times = [median(row) for row in pair]
            where = [*map(str, (key[0], key[1], key[3])), title(method)]
            if None in times or None in floors:
                lines.append([*where, *(row["status"] for row in pair), "", ""])
                continue
            ratios = [time / floor for time, floor in zip(times, floors, strict=True)]
            peaks = [row["peak_extra_bytes"] for row in pair]
            lines.append(
                [
                    *where,
                    *(f"{ratio:.2f} x floor" for ratio in ratios),
                    f"{100 * (ratios[1] / ratios[0] - 1):+.1f} %",
                    "" if None in peaks else f"{size(peaks[0])} -> {size(peaks[1])}",
                ]
            )
    parts = [f"A: {describe(before.environment)}", f"B: {describe(after.environment)}"]
    parts.append(table(["shape", "N", "job", "method", "A", "B", "change", "peak extra memory"], lines))
    if alone:
        parts.append(f"{alone} rows are in one of the two alone.")
    return "\n\n".join(parts)
