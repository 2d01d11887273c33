"""Training steps as tables: measured ones out of a result file, and computed ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from . import step_counts as counts
from .report import describe, duration, size, table
from .results import Results, Row, median
from .step import LONGEST, ROLLOUT
from .step_hybrids import HYBRIDS
from .step_methods import METHODS, PHASES, differing
from .step_problem import PAIRS, PAPER, SINGLE, TOYS, Load, paper_load

#: (what, bound, whether larger is better); ratios of seconds, or of FLOPs where nothing was measured.
_TARGETS = {
    "time / plain": (1.30, False),
    "time / plain, with rollout": (1.15, False),
    "naive / time": (1.5, True),
    "activations / naive": (0.5, False),
}
_OURS = ("vgs", "vgs-shared")
_OF_PADDED, _OF_PLAIN = 0.6, 0.9  # aimed at for hybrid families: packed steps' time, and their FLOPs


def targets(alone: Mapping[str, float], whole: Mapping[str, float], memory: Mapping[str, float]) -> str:
    """Ours against what was aimed at.

    Args:
        alone: a step's cost without its rollout, by method. whole: with it. memory: of activations.
    """
    lines = []
    for name in (name for name in _OURS if name in alone):
        ratios = {
            "time / plain": (alone.get(name), alone.get("plain")),
            "time / plain, with rollout": (whole.get(name), whole.get("plain")),
            "naive / time": (alone.get("vgs-naive"), alone.get(name)),
            "activations / naive": (memory.get(name), memory.get("vgs-naive")),
        }
        for label, (upper, lower) in ratios.items():
            if not upper or not lower:
                continue
            bound, larger = _TARGETS[label]
            met = upper / lower >= bound if larger else upper / lower <= bound
            limit = f"{'>=' if larger else '<='} {bound:.2f}"
            lines.append([METHODS[name].title, label, f"{upper / lower:.2f}", limit, "met" if met else "missed"])
    return table(["method", "ratio", "value", "target", ""], lines)


def describe_load(load: Load) -> str:
    return (
        f"prompts: {load.prompts}, responses to each: {load.generations}, of {load.shortest:,}-{load.longest:,} "
        f"tokens, {load.micro_batch} in a pass; {load.patches:,} patches and {load.prompt} text tokens a prompt"
    )


def _title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


# --- measured -----------------------------------------------------------------------------------------------------


def _phases(row: Row) -> dict[str, float]:
    """Median seconds by phase."""
    return {phase: statistics.median(row["phase_seconds"][phase]) for phase in PHASES if phase in row["phase_seconds"]}


def _cell_table(pair: str, load: Load, rows: Mapping[str, Row]) -> str:
    plain = median(rows.get("plain"))
    counted = {name: sum(counts.flops(METHODS[name], load, pair).values()) for name in differing(4)}
    lines = []
    for name, row in rows.items():
        if name == ROLLOUT:
            continue
        own = median(row)
        if own is None:
            lines.append([_title(name), row["status"], *[""] * (len(PHASES) + 3)])
            continue
        phases, peaks, peak = _phases(row), row["phase_peak_bytes"], row["peak_extra_bytes"]
        cells = [duration(phases[phase]) + (f" ({size(peaks[phase])})" if phase in peaks else "") for phase in PHASES]
        ratio = f"{own / plain:.2f}" if plain else ""
        flops = f"{counted[name] / counted['plain']:.2f}" if name in counted else ""
        lines.append([_title(name), *cells, duration(own), ratio, flops, "" if peak is None else size(peak)])
    header = ["method", *PHASES, "step without rollout", "x plain", "FLOPs x plain, computed", "activations"]
    return table(header, lines)


def _rollout_line(row: Row) -> str:
    if row["status"] != "ok":
        return f"Rollout: {row['status']}."
    pace = row["sequences"] * row["sampled"] / row["seconds"][0]
    text = (
        f"Rollout by `generate`, the same for all: {duration(row['seconds'][0])} for {row['sampled']} tokens of "
        f"{row['sequences']} sequences ({pace:,.0f} tokens/s, prompts included)"
    )
    if row["sampled"] == row["longest"]:
        return text + ", measured in full."
    return (
        text
        + f"; computed from this for the longest response of {row['longest']:,}: {duration(row['computed_seconds'])}."
    )


def _cell_targets(rows: Mapping[str, Row]) -> str:
    alone = {name: median(row) for name, row in rows.items() if name != ROLLOUT and median(row)}
    sampling = rows.get(ROLLOUT, {}).get("computed_seconds")
    whole = {name: value + sampling for name, value in alone.items()} if sampling else {}
    return targets(alone, whole, {name: row.get("peak_extra_bytes") or 0 for name, row in rows.items()})


def _padded_line(rows: Mapping[str, Row]) -> str:
    """What packing a family makes of its step."""
    padded, shared = median(rows.get("vgs-padded")), median(rows.get("vgs-shared"))
    if not padded or not shared:
        return ""
    verdict = "met" if shared <= _OF_PADDED * padded else "missed"
    return (
        f"Packed and shared: {shared / padded:.2f} of the padded step's time (aimed at: {_OF_PADDED:.2f}, {verdict})."
    )


def _longest_table(cells: Sequence[tuple[tuple, dict[str, Row]]]) -> str:
    lines = []
    for (pair, _, _, job), rows in cells:
        for name, row in rows.items() if job == LONGEST else ():
            if row["status"] != "ok":
                lines.append([pair, _title(name), row["status"], ""])
                continue
            fails = "not found" if row["fails"] is None else f"{row['fails']:,}"
            lines.append([pair, _title(name), f"{row['fits']:,}", fails + (" (stopped)" if row["stopped"] else "")])
    return "" if not lines else table(["pair", "method", "longest responses that fit", "that do not"], lines)


def _student_table(cells: Sequence[tuple[tuple, dict[str, Row]]]) -> str:
    """Which students took a step, at G = 4."""
    tried = {pair: rows for (pair, _, _, job), rows in cells if job == "G4" and pair not in TOYS}
    methods = dict.fromkeys(name for rows in tried.values() for name in rows if name != ROLLOUT)
    lines = [
        [_title(name), *(rows.get(name, {}).get("status", "not tried") for rows in tried.values())] for name in methods
    ]
    return "" if not lines else table(["method", *tried], lines)


def tables(results: Results) -> str:
    """Every cell by phase, its ratios, and what fits."""
    parts, cells = [], list(results.cells())
    for (pair, tokens, dtype, job), rows in cells:
        if job == LONGEST:
            continue
        values = next(iter(rows.values()))["load"]
        load = Load(**{**values, "grid": tuple(values["grid"])})
        parts.append(f"**{pair}, {job}**: {describe_load(load)}; {tokens:,} response tokens, {dtype}")
        parts += (
            [_cell_table(pair, load, rows), _rollout_line(rows[ROLLOUT])]
            if ROLLOUT in rows
            else [_cell_table(pair, load, rows)]
        )
        if pair not in TOYS:  # the targets are for real sizes
            parts.append(_cell_targets(rows))
        elif pair in HYBRIDS and (line := _padded_line(rows)):
            parts.append(line)
    parts += ["**Longest response that fits**", longest] if (longest := _longest_table(cells)) else []
    parts += ["**Students that fit**", students] if (students := _student_table(cells)) else []
    return "\n\n".join(parts)


def markdown(results: Results) -> str:
    """Where it was measured, every cell, and what is missing."""
    environment = results.environment
    notes = (
        f"{environment['precision']}; gradient checkpointing; fused AdamW with float32 states; plain distillation's "
        f"loss: {environment['plain_loss']}. Behind a phase's seconds: its peak memory beyond what it found. "
        "Activations: the peak of teacher to backward beyond weights, gradients and optimizer state."
    )
    parts = [describe(environment), notes, tables(results)]
    if missing := environment.get("missing"):
        parts.append("Missing: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + ".")
    return "\n\n".join(parts)


# --- computed -----------------------------------------------------------------------------------------------------


def _count_cell(pair: str, load: Load, flops: float, bytes_per_second: float) -> list[str]:
    work = {name: counts.mean_flops(METHODS[name], load, pair) for name in differing(load.generations)}
    memory = {
        name: max(max(counts.activation_bytes(METHODS[name], one, pair).values()) for one in counts.steps(load))
        for name in work
    }
    alone = {name: sum(phases.values()) for name, phases in work.items()}
    sampling, streamed = counts.Rollout.mean(load, pair), counts.optimizer_bytes(pair)
    taken = {name: total / flops + streamed / bytes_per_second for name, total in alone.items()}
    rolled = sampling.seconds(flops, bytes_per_second)
    lines = [
        [
            METHODS[name].title,
            *(f"{phases[phase] / 1e12:.0f}" for phase in PHASES if phase != "optimizer"),
            f"{alone[name] / 1e12:.0f}",
            f"{alone[name] / alone['plain']:.2f}",
            size(memory[name]),
            duration(taken[name]),
        ]
        for name, phases in work.items()
    ]
    header = [
        *("method", *(phase for phase in PHASES if phase != "optimizer")),
        *("TFLOP in all", "x plain", "activations", "time at the assumed rates"),
    ]
    caption = (
        f"Optimizer: {size(streamed)} streamed. Rollout, the same for all: {sampling.prefill_flops / 1e12:.0f} TFLOP "
        f"for the prompts, {sampling.decode_flops / 1e12:.0f} TFLOP and {sampling.decode_bytes / 1e12:.1f} TB for the "
        f"responses, {duration(rolled)} at the assumed rates."
    )
    whole = {name: value + rolled for name, value in taken.items()}
    return [
        f"**{pair}, G = {load.generations}**: {describe_load(load)}. TFLOP by phase",
        *(table(header, lines), caption, targets(alone, whole, memory)),
    ]


def _hybrid_cell(pair: str, load: Load) -> list[str]:
    """FLOPs alone, for pairs of which nothing else is counted."""
    work = {name: counts.mean_flops(METHODS[name], load, pair) for name in differing(load.generations)}
    plain, shown = sum(work["plain"].values()), [phase for phase in PHASES if phase != "optimizer"]
    lines = [
        [
            METHODS[name].title,
            *(f"{phases[phase] / 1e12:.0f}" for phase in shown),
            f"{sum(phases.values()) / plain:.2f}",
        ]
        for name, phases in work.items()
    ]
    parts = [f"**{pair}, G = {load.generations}**: {describe_load(load)}. TFLOP by phase"]
    parts.append(table(["method", *shown, "x plain"], lines))
    if load.generations > 1:
        ratio = sum(work["vgs-shared"].values()) / plain
        verdict = "met" if ratio <= _OF_PLAIN else "missed"
        parts.append(f"VGS, shared: {ratio:.2f} of plain, padded (aimed at: {_OF_PLAIN:.2f}, {verdict}).")
    return parts


#: (method, teacher offloaded)
_FITTED = (("plain", False), ("vgs-naive", False), ("vgs", False), ("vgs", True))


def _length(tokens: int) -> str:
    return f"{'>= ' if tokens == counts.LONGEST else ''}{tokens:,}" if tokens else "does not fit"


def _count_fits(pairs: Sequence[str], memory: float) -> list[str]:
    lengths, students = [], []
    for name, offloaded in _FITTED:
        method, title = METHODS[name], _title(name) + (", teacher in host memory" if offloaded else "")
        longest = [counts.longest_response(method, SINGLE, pair, memory, offloaded=offloaded) for pair in pairs]
        lengths.append([title, *map(_length, longest)])
        needed = [counts.peak_bytes(method, PAPER[4], pair, offloaded=offloaded) for pair in pairs]
        students.append([title, *(f"{size(x)}{'' if x <= memory else ' (does not fit)'}" for x in needed)])
    return [
        f"**Longest response that fits** into {size(memory)}, alone in its pass",
        table(["method", *pairs], lengths),
        f"**Students that fit** into {size(memory)}: memory of a step of {describe_load(PAPER[4])}",
        table(["method", *pairs], students),
    ]


def computed(pairs: Sequence[str], flops: float, bytes_per_second: float, memory: float) -> str:
    """Markdown: steps by count. Everything in it is computed.

    Args:
        pairs: names out of ``PAIRS``.
        flops, bytes_per_second: assumed rates, where a time is asked for.
        memory: bytes of the device that parts must fit into.
    """
    parts = [
        "**Computed, not measured.** FLOPs of matrix products and attention; a backward is two forwards (of attention "
        "two and a half), gradient checkpointing one more; attention counts causal pairs, which is kind to padded "
        "batches; plain distillation's loss at its floor. Times assume "
        f"{flops / 1e12:g} TFLOP/s and {bytes_per_second / 1e12:g} TB/s throughout, for every method alike. Memory: "
        "float32 student, gradients and AdamW, 16-bit teacher, gradient checkpointing. Averages of 64 steps of other "
        "lengths, the largest memory of them."
    ]
    hybrids = [pair for pair in pairs if pair in HYBRIDS]
    for pair in hybrids:
        for generations in (*PAPER, 8):
            parts += _hybrid_cell(pair, paper_load(pair, generations))
    if hybrids and len(hybrids) == len(pairs):
        return "\n\n".join(parts)
    for pair in (pair for pair in pairs if pair not in HYBRIDS):
        for load in PAPER.values():
            parts += _count_cell(pair, load, flops, bytes_per_second)
    return "\n\n".join([*parts, *_count_fits([x for x in PAIRS if x not in TOYS and x not in HYBRIDS], memory)])


def panels(results: Results | None, pairs: Sequence[str] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """For a picture: {cell: {method: {phase: value}}}, median seconds of a result, or TFLOP by count without one."""
    if results is None:
        return {
            f"{pair}, G = {load.generations}": {
                METHODS[name].title: {
                    phase: work / 1e12 for phase, work in counts.mean_flops(METHODS[name], load, pair).items() if work
                }
                for name in differing(load.generations)
            }
            for pair in pairs
            for load in (paper_load(pair, generations) for generations in PAPER)
        }
    return {
        f"{pair}, {job}": {_title(name): _phases(row) for name, row in rows.items() if name != ROLLOUT and median(row)}
        for (pair, _, _, job), rows in results.cells()
        if job != LONGEST
    }
