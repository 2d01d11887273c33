"""Ahead-of-time compilation of every Triton kernel for real GPU targets; needs no GPU.

Reports registers, spills, shared memory, the width of global loads and floating-point work, read from the machine
code, and the bytes that a token moves, by count.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vgs_kernels.rows import (
    columns_triton,
    entries_triton,
    entry_triton,
    picks_triton,
    rows_triton,
    slots_triton,
    triton_common,
)
from vgs_kernels.rows.layout import PAIR_STATE, VGS_STATE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
#: The vocabulary for which bytes and floating-point work of a token are given (Qwen3).
VOCABULARY = 151_936
_ITEMSIZE = {"fp32": 4, "bf16": 2}
_PLAIN = {"STUDENT_CAP": False, "TARGET_CAP": False, "MASKED": False}
_CAPS = {**_PLAIN, "STUDENT_CAP": True, "TARGET_CAP": True}
_MASKED, _MASKED_CAPS = {**_PLAIN, "MASKED": True}, {**_CAPS, "MASKED": True}


class Variant(NamedTuple):
    """Compile-time options, dtype of the logits, dtype of their gradient (of results that are none: float32)."""

    options: dict[str, Any]
    logits: str
    gradient: str = "fp32"


class Kernel(NamedTuple):
    """``sweep`` is what it does with a tile: ``"read"``, ``"write"`` the gradient, or ``"none"`` at all; then it has a
    ``layout`` and ``warps`` of its own. Those read scalars of tokens, or finished gradients."""

    function: triton.JITFunction
    sweep: str
    variants: list[Variant]
    layout: dict[str, int] | None = None
    warps: int = 1


#: Projected logits are float32, may be capped, and masked where a head has a bias; logits that the caller holds are of
#: any dtype, which their gradient shares, and may be masked.
_READS = [*((options, "fp32") for options in (_PLAIN, _CAPS, _MASKED, _MASKED_CAPS)), (_MASKED, "bf16")]
_WRITES = [
    (_PLAIN, "fp32", "fp32"),
    *((options, "fp32", "bf16") for options in (_PLAIN, _CAPS, _MASKED, _MASKED_CAPS)),
    (_MASKED, "fp32", "fp32"),
    (_MASKED, "bf16", "bf16"),
]
#: The least and the most of projected logits, and held ones: for what has many variants of its own.
_FEW_READS = [(_PLAIN, "fp32"), (_MASKED_CAPS, "fp32"), (_MASKED, "bf16")]
_FEW_PROJECTED = [(_PLAIN, "fp32", "bf16"), (_MASKED_CAPS, "fp32", "bf16")]
_FEW_WRITES = [*_FEW_PROJECTED, (_MASKED, "bf16", "bf16")]


def _variants(flags: str, used: Sequence[str], tiles: Sequence[tuple], **fixed: int) -> list[Variant]:
    """Every set of flags in use on every sort of tile."""
    return [
        Variant({**fixed, **{flag: flag in on.split() for flag in flags.split()}, **options}, *dtypes)
        for on in used
        for options, *dtypes in tiles
    ]


def _entries(flags: str, tiles: Sequence[tuple], used: dict[str, Sequence[str]]) -> list[Variant]:
    """``used``: sets of flags by divergence."""
    kinds = entry_triton.KINDS
    return [variant for name in used for variant in _variants(flags, used[name], tiles, KIND=kinds[name])]


#: Finished gradients.
_BLOCKS = [Variant({}, "fp32", "fp32"), Variant({}, "fp32", "bf16")]
_GRADIENT = "FOUR PRIOR CLIP TAIL POLICY SLOTS"
KERNELS = {
    "statistics_kernel": Kernel(rows_triton.statistics_kernel, "read", _variants("FOUR", ("FOUR", ""), _READS)),
    "merge_kernel": Kernel(
        rows_triton.merge_kernel, "none", _variants("FOUR", ("FOUR", ""), [({}, "fp32")]), rows_triton.MERGE_LAYOUT
    ),
    "slots_kernel": Kernel(
        slots_triton.slots_kernel,
        "none",
        _variants(
            "KNOWN LIMITED COUNTED EXACT", ("", "COUNTED", "LIMITED", "KNOWN LIMITED COUNTED EXACT"), [({}, "fp32")]
        ),
        slots_triton.LAYOUT,
        slots_triton.WARPS,
    ),
    "pick_kernel": Kernel(
        picks_triton.pick_kernel,
        "none",
        _variants("BOTH", ("BOTH", ""), _READS),
        picks_triton.LAYOUT,
        picks_triton.WARPS,
    ),
    "token_scalars_kernel": Kernel(
        picks_triton.token_scalars_kernel,
        "none",
        _variants(
            "SAMPLED CLIP POLICY COMPARES",
            ("CLIP", "POLICY COMPARES", "CLIP POLICY COMPARES", "SAMPLED", "SAMPLED CLIP POLICY COMPARES"),
            [({}, "fp32")],
        ),
        picks_triton.LAYOUT,
        picks_triton.WARPS,
    ),
    "row_sums_kernel": Kernel(columns_triton.row_sums_kernel, "none", _BLOCKS, columns_triton.SUMS_LAYOUT, 8),
    "thresholds_kernel": Kernel(
        columns_triton.thresholds_kernel, "none", _BLOCKS, columns_triton.sample_layout(256), 8
    ),
    "below_kernel": Kernel(
        columns_triton.below_kernel,
        "none",
        [Variant({"SOME": some}, "fp32", block.gradient) for some in (False, True) for block in _BLOCKS],
        columns_triton.BELOW_LAYOUT,
        8,
    ),
    "gradient_kernel": Kernel(
        entries_triton.gradient_kernel,
        "write",
        [
            *_variants(_GRADIENT, ("FOUR", "FOUR PRIOR"), _WRITES, KIND=0),
            *_variants(_GRADIENT, ("FOUR PRIOR POLICY",), _FEW_WRITES, KIND=0),
            *_variants(_GRADIENT, ("FOUR SLOTS", "FOUR POLICY SLOTS"), _FEW_PROJECTED, KIND=0),
            *_entries(
                *(_GRADIENT, _FEW_WRITES),
                {
                    "reverse_kl": ("", "CLIP TAIL POLICY"),
                    "forward_kl": ("", "CLIP TAIL POLICY"),
                    "jsd": ("", "CLIP", "CLIP TAIL POLICY"),
                    "even_jsd": ("", "CLIP TAIL POLICY"),
                },
            ),
        ],
    ),
    "totals_kernel": Kernel(
        entries_triton.totals_kernel,
        "read",
        _entries(
            *("CLIP TAIL SKIP SLOTS", _FEW_READS),
            {
                "reverse_kl": ("SKIP", "SKIP SLOTS", "CLIP TAIL"),
                "forward_kl": ("SKIP", "CLIP TAIL"),
                "jsd": ("", "CLIP", "CLIP TAIL"),
                "even_jsd": ("", "CLIP TAIL"),
            },
        ),
    ),
}


@dataclass
class Resources:
    """What one compiled kernel takes.

    Spills are bytes (NVIDIA) or registers (AMD). ``aligned`` is whether rows begin at multiples of 16 bytes, as ours
    do and a caller's logits may not. ``token_bytes`` are those that one token reads and writes at ``VOCABULARY``
    columns; ``token_flops`` come from the instructions of one column block, a fused multiply-add being two. Both are 0
    where a program has to do with many tokens, or with gradients.
    """

    kernel: str
    options: dict[str, Any]
    target: str
    logits: str
    gradient: str
    registers: int
    spills: int
    shared_bytes: int
    wide_loads: int
    loads: int
    aligned: bool
    token_bytes: int
    token_flops: int


class _Machine(NamedTuple):
    """Read from machine code: flops are those of one thread and one pass through the code."""

    registers: int
    spills: int
    wide_loads: int
    loads: int
    flops: int


_POINTERS = {
    **dict.fromkeys(("chosen_ptr", "token_ptr", "id_ptr"), "*i64"),
    **dict.fromkeys(("slope_ptr", "old_ptr"), "*fp64"),
    **dict.fromkeys(("slot_ptr", "used_ptr", "formed_ptr"), "*i32"),
    "counted_ptr": "*i1",
}


def _signature(kernel: triton.JITFunction, logits: str, gradient: str, constants: dict[str, Any]) -> dict[str, str]:
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in _POINTERS:
            kinds[name] = _POINTERS[name]
        elif name in ("s_ptr", "t_ptr", "a_ptr", "w_ptr"):
            kinds[name] = f"*{logits}"
        elif name == "g_ptr" or (name in ("out_ptr", "out_text_ptr") and "s_ptr" in kernel.arg_names):
            kinds[name] = f"*{gradient}"
        elif name.endswith("_ptr"):
            kinds[name] = "*fp32"
        elif name.endswith("_stride"):
            kinds[name] = "i64"
        else:
            kinds[name] = "i32" if name.startswith(("n_", "start", "first", "every")) else "fp32"
    return kinds


def _nvidia(binary: bytes) -> _Machine:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("--dump-resource-usage", "--dump-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    spills = int(re.search(r"STACK:(\d+)", usage).group(1)) + len(re.findall(r"\b(?:STL|LDL)\b", code))
    loads = re.findall(r"\bLDG(\S*)", code)
    # sm_100 has two-wide forms (FADD2 and so on).
    flops = sum(
        weight * (2 if wide else 1) * len(re.findall(rf"\b{name}{wide}\b", code))
        for name, weight in {"FADD": 1, "FMUL": 1, "FMNMX": 1, "MUFU": 1, "FFMA": 2}.items()
        for wide in ("", "2")
    )
    return _Machine(registers, spills, sum(".128" in load for load in loads), len(loads), flops)


def _amd(assembly: str) -> _Machine:
    registers, *spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly)
    work = re.findall(r"\bv_(pk_)?(add|sub|mul|max|exp|log|rcp|fma|fmac)_f32", assembly)
    flops = sum((2 if packed else 1) * (2 if name.startswith("fma") else 1) for packed, name in work)
    return _Machine(registers, sum(spills), sum("dwordx4" in load for load in loads), len(loads), flops)


def _column_bytes(sweep: str, variant: Variant) -> int:
    """Bytes that one token moves for one column: every logit row once, every gradient row once."""
    used = {key for key, value in variant.options.items() if value}
    written = {"read": 0, "write": 2 if "PRIOR" in used else 1}[sweep]
    rows = 4 if "FOUR" in used else 2
    return rows * _ITEMSIZE[variant.logits] + written * _ITEMSIZE[variant.gradient]


def compile_kernel(name: str, variant: Variant, target: str, aligned: bool = True) -> Resources:
    """Compile one kernel as it is launched, on rows that are aligned to 16 bytes or are not."""
    whole = KERNELS[name]
    kernel, sweep = whole.function, whole.sweep
    options, logits, gradient = variant
    backend = TARGETS[target].backend
    warps, layout, block = whole.warps, whole.layout, 0
    if sweep == "read":
        warps, layout = (
            triton_common.STATISTICS_WARPS[backend],
            triton_common.statistics_layout(backend, _ITEMSIZE[logits], aligned),
        )
        block = layout["LANES"] * layout["WIDTH"]
    elif sweep == "write":
        warps, block = triton_common.GRADIENT_WARPS[backend], triton_common.GRADIENT_BLOCK
        layout = {"BLOCK": block, "SPLITS": triton_common.MERGE_LANES}
    constants = {**options, **layout}
    signature = _signature(kernel, logits, gradient, constants)
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.params)
        if not (argument.do_not_specialize or argument.do_not_specialize_on_alignment)
        if argument.name.endswith("_ptr")
        or (aligned and (argument.name.endswith("_stride") or argument.name.startswith("n_")))
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps, **triton_common.OPTIONS})
    machine = _nvidia(compiled.asm["cubin"]) if backend == "cuda" else _amd(compiled.asm["amdgcn"])
    if block:
        columns_a_thread = block / (TARGETS[target].warp_size * warps)
        token_bytes = VOCABULARY * _column_bytes(sweep, variant)
        token_flops = round(VOCABULARY * machine.flops / columns_a_thread)
    elif name == "merge_kernel":  # once a token, one lane a thread
        token_bytes = 4 * (layout["LANES"] + 1) * len(VGS_STATE if options["FOUR"] else PAIR_STATE)
        token_flops = machine.flops * TARGETS[target].warp_size
    else:
        token_bytes = token_flops = 0
    return Resources(
        *(name, options, target, logits, gradient),
        *(machine.registers, machine.spills, compiled.metadata.shared, machine.wide_loads, machine.loads, aligned),
        *(token_bytes, token_flops),
    )


def _held(sweep: str, variant: Variant) -> bool:
    """Whether the logits may be a caller's, whose rows need not be aligned."""
    options, logits, gradient = variant
    return sweep != "none" and options["MASKED"] and not options["STUDENT_CAP"] and logits in ("bf16", gradient)


def launches(targets: list[str] | None = None) -> list[tuple[str, Variant, str, bool]]:
    """Arguments of ``compile_kernel``: every variant on every target; of a caller's logits, also unaligned.

    Raises:
        ValueError: for an unknown target.
    """
    for target in targets or ():
        if target not in TARGETS:
            raise ValueError(f"targets must be among {', '.join(TARGETS)}, got {target!r}.")
    return [
        (name, variant, target, aligned)
        for target in targets or TARGETS
        for name, kernel in KERNELS.items()
        for variant in kernel.variants
        for aligned in ((True, False) if _held(kernel.sweep, variant) else (True,))
    ]


def report(targets: list[str] | None = None) -> list[dict[str, Any]]:
    """Resources of all ``launches``, as dictionaries.

    Raises:
        ValueError: for an unknown target.
    """
    return [asdict(compile_kernel(*launch)) for launch in launches(targets)]


def _named(option: str, value: int) -> str:
    return option if value is True else f"{option}={value}"


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line a kernel, for people."""
    return [
        f"{row['target']:7} {row['kernel']:21} {row['logits']}->{row['gradient']} "
        f"{' '.join(_named(*option) for option in row['options'].items() if option[1] is not False):38} "
        f"{'' if row['aligned'] else 'unaligned, '}{row['registers']} registers, {row['spills']} spills, "
        f"{row['shared_bytes']} B shared, {row['wide_loads']}/{row['loads']} wide loads, "
        f"{row['token_bytes'] / 1e6:.2f} MB and {row['token_flops'] / 1e6:.1f} MFLOP a token"
        for row in rows
    ]
