"""What would make a run fit into its GPUs: every setting that saves memory, tried by planning again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from .memory import Lengths, Machine, predict, training_options

SMALL_WORKSPACE = 2**28
PASS_MULTIPLE = 64
LORA = {
    "r": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
Case = tuple[dict[str, Any], Machine]


def _with(config: Mapping[str, Any], section: str, **settings: Any) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    changed[section] = {**changed.get(section, {}), **settings}
    return changed


def remedies(config: Mapping[str, Any], machine: Machine, shortest_pass: int) -> Iterator[tuple[str, Case]]:
    """Settings that need less memory than the given ones, from the cheapest to the one that costs most.

    First what costs almost nothing, then time (moving the teacher, computing twice, moving parameters between GPUs),
    then exactness (the teacher in 8 bit), then another student (LoRA).

    Args:
        config: of ``load_config``.
        machine: the GPUs.
        shortest_pass: the least max_tokens_per_pass, in tokens (``Plan.shortest_pass``).

    Returns:
        For each the setting as one writes it, and the config and machine with it.
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
        yield "--sharding fsdp2", (dict(config), replace(machine, sharding="fsdp2"))
    if not eight and not options.teacher_offload:
        yield "teacher.load_in_8bit: true", (_with(config, "teacher", load_in_8bit=True), machine)
    if not config.get("lora"):
        yield f"lora: {{r: {LORA['r']}, ...}}", (_with(config, "lora", **LORA), machine)


def _fits(case: Case, lengths: Lengths) -> bool:
    config, machine = case
    return predict(config, machine, lengths).peak <= machine.memory


def advise(config: Mapping[str, Any], machine: Machine, lengths: Lengths) -> tuple[list[str], list[str]]:
    """What would make a run fit that does not, by planning again.

    Args:
        config, machine, lengths: see ``memory.predict``; the machine's memory must be known.

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
    """The largest max_tokens_per_pass that fits, in steps of ``PASS_MULTIPLE``; None if the shortest pass does not.

    Args:
        config, machine, lengths: see ``memory.predict``; the machine's memory must be known.
    """

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
