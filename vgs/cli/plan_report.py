"""What ``vgs plan`` says: the table, whether it fits, and which settings would make it fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import torch

from ..planning.advice import advise, largest_pass
from ..planning.memory import GIB, PHASES, Lengths, Machine, Plan, predict


def device_memory() -> int | None:
    """Bytes of this machine's GPU; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def table(plan: Plan) -> str:
    """Parts by phase, in GiB."""
    rows = [("GiB", *PHASES)]
    for name, sizes in plan.parts.items():
        rows.append((name, *(f"{sizes[phase] / GIB:.2f}" if phase in sizes else "-" for phase in PHASES)))
    rows.append(("sum", *(f"{plan.total(phase) / GIB:.2f}" for phase in PHASES)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{name:<{width}}" + "".join(f"{cell:>11}" for cell in cells) for name, *cells in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1]])


def report(config: Mapping[str, Any], machine: Machine, lengths: Lengths) -> dict[str, Any]:
    """Everything that ``vgs plan`` prints, for machines: bytes, and ``text`` for people.

    Args:
        config: of ``load_config``.
        machine: the GPUs.
        lengths: of the samples, in tokens.

    Raises:
        ConfigError: as ``planning.memory.predict``.
    """
    plan = predict(config, machine, lengths)
    spread = f"{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}, {machine.sharding}"
    text = [
        f"Predicted memory of one GPU (of {spread}); computed from shapes, not measured.",
        f"Largest pass: {plan.pass_tokens:,} tokens (teacher {plan.teacher_pass_tokens:,}).",
        "",
        table(plan),
        "",
        *plan.notes,
        f"Peak: {plan.peak / GIB:.1f} GiB in phase {plan.peak_phase}.",
    ]
    result: dict[str, Any] = {
        "predicted": True,
        "parts": plan.parts,
        "phases": {phase: plan.total(phase) for phase in PHASES},
        "peak_bytes": plan.peak,
        "peak_phase": plan.peak_phase,
        "pass_tokens": plan.pass_tokens,
        "teacher_pass_tokens": plan.teacher_pass_tokens,
        "notes": list(plan.notes),
        "gpus": machine.gpus,
        "sharding": machine.sharding,
        "gpu_memory_bytes": machine.memory,
    }
    if machine.memory is not None:
        result["fits"] = plan.peak <= machine.memory
        result["largest_max_tokens_per_pass"] = largest_pass(config, machine, lengths)
        free = abs(machine.memory - plan.peak) / GIB
        if result["fits"]:
            text.append(f"It fits into {machine.memory / GIB:.1f} GiB, {free:.1f} GiB are left.")
        else:
            text.append(f"It does not fit into {machine.memory / GIB:.1f} GiB, {free:.1f} GiB are missing.")
            alone, together = advise(config, machine, lengths)
            result |= {"fits_with_one_of": alone, "fits_with_all_of": together}
            if alone:
                text.append(f"Enough on its own, cheapest first: {'; '.join(alone)}.")
            elif together:
                text.append(f"Enough together, cheapest first: {'; '.join(together)}.")
            else:
                text.append("No combination of the settings known here is enough: more GPUs or a smaller model.")
        most = result["largest_max_tokens_per_pass"]
        if most is None:
            text.append("Whatever max_tokens_per_pass, it does not fit: the rest is too large.")
        else:
            text.append(
                f"Largest max_tokens_per_pass that fits: {most:,} of {plan.batch_tokens:,} in a generation batch."
            )
    result["text"] = "\n".join(text)
    return result


def show(config: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The ``plan`` command: prints a report on ``config``, as a table or as JSON.

    Args:
        config: of ``load_config``.
        options: of the command line.

    Raises:
        ConfigError: as ``planning.memory.predict``.
    """
    memory = device_memory() if options.gpu_memory is None else round(options.gpu_memory * GIB)
    machine = Machine(options.gpus, options.sharding, memory)
    result = report(config, machine, Lengths(options.prompt_tokens, options.image_tokens, options.response_tokens))
    text = result.pop("text")
    print(json.dumps(result) if options.json else text)
