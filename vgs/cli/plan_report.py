"""What ``vgs plan`` says: the table, whether it fits, and which settings would make it fit."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..planning.memory import GIB, PHASES, Lengths, Machine, Plan, predict, training_options

SMALL_WORKSPACE = 2**28
PASS_MULTIPLE = 64
LORA = {
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
Case = tuple[dict[str, Any], Machine]


def device_memory() -> int | None:
    """Bytes of this machine's GPU; None without one."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def _with(config: Mapping[str, Any], section: str, **settings: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    changed[section] = {**changed.get(section, {}), **settings}
    return changed


def remedies(config: Mapping[str, Any], machine: Machine, shortest_pass: int) -> Iterator[tuple[str, Case]]:
    """Settings that need less memory than the given ones, from the cheapest to the one that costs most.

    First what costs almost nothing, then time (moving the teacher, computing twice, moving parameters between GPUs),
    then exactness (the teacher in 8 bit), then another student (LoRA).
    """
    options = training_options(config)
    if options.loss_workspace_bytes > SMALL_WORKSPACE:
        changed = _with(config, "training", loss_workspace_bytes=SMALL_WORKSPACE)
        yield f"loss_workspace_bytes: {SMALL_WORKSPACE}", (changed, machine)
    if options.use_vllm and options.vllm_mode == "colocate" and not options.vllm_enable_sleep_mode:
        yield "vllm_enable_sleep_mode: true", (_with(config, "training", vllm_enable_sleep_mode=True), machine)
    if options.max_tokens_per_pass is None or options.max_tokens_per_pass > shortest_pass:
        changed = _with(config, "training", max_tokens_per_pass=shortest_pass)
        yield f"max_tokens_per_pass: {shortest_pass}", (changed, machine)
    eight = config["teacher"].get("load_in_8bit", False)
    if not options.teacher_offload and not eight:  # quantised weights cannot be moved
        yield "teacher_offload: true", (_with(config, "training", teacher_offload=True), machine)
    if not options.gradient_checkpointing:
        yield "gradient_checkpointing: true", (_with(config, "training", gradient_checkpointing=True), machine)
    if machine.gpus > 1 and machine.sharding == "ddp":
        measured = " with eta: a number" if options.eta == "measure" else ""  # measuring needs whole parameters
        yield f"--sharding fsdp2{measured}", (dict(config), replace(machine, sharding="fsdp2"))
    if not eight and not options.teacher_offload:
        yield "teacher.load_in_8bit: true", (_with(config, "teacher", load_in_8bit=True), machine)
    if not config.get("lora"):
        yield f"lora: {{r: {LORA['r']}, ...}}", (_with(config, "lora", **LORA), machine)


def _fits(case: Case, lengths: Lengths) -> bool:
    config, machine = case
    return predict(config, machine, lengths).peak <= machine.memory


def advise(config: Mapping[str, Any], machine: Machine, lengths: Lengths) -> tuple[list[str], list[str]]:
    """What would make a run fit that does not, by planning again.

    Returns:
        (settings each of which is enough alone, the shortest row of settings from the cheapest on that is enough
        together, [] if all of them are not enough).
    """
    shortest = predict(config, machine, lengths).shortest_pass
    alone = [name for name, case in remedies(config, machine, shortest) if _fits(case, lengths)]
    together: list[str] = []
    case: Case = (dict(config), machine)
    while not _fits(case, lengths):
        following = next(remedies(*case, shortest), None)
        if following is None:
            return alone, []
        name, case = following
        together.append(name)
    return alone, together


def largest_pass(config: Mapping[str, Any], machine: Machine, lengths: Lengths) -> int | None:
    """The largest max_tokens_per_pass that fits, in steps of ``PASS_MULTIPLE``; None if the shortest pass does not."""

    def fits(tokens: int) -> bool:
        return _fits((_with(config, "training", max_tokens_per_pass=tokens), machine), lengths)

    plan = predict(config, machine, lengths)
    low = -(-plan.shortest_pass // PASS_MULTIPLE)
    high = max(low, -(-plan.batch_tokens // PASS_MULTIPLE))
    if not fits(low * PASS_MULTIPLE):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * PASS_MULTIPLE) else (low, middle - 1)
    return low * PASS_MULTIPLE


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
    """Everything that ``vgs plan`` prints, for machines: bytes, and ``text`` for people."""
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
    """The ``plan`` command: prints a report on ``config``, as a table or as JSON."""
    memory = device_memory() if options.gpu_memory is None else round(options.gpu_memory * GIB)
    machine = Machine(options.gpus, options.sharding, memory)
    result = report(config, machine, Lengths(options.prompt_tokens, options.image_tokens, options.response_tokens))
    text = result.pop("text")
    print(json.dumps(result) if options.json else text)
