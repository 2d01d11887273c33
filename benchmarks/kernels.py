"""Ahead-of-time compilation of every Triton kernel for real GPU targets; needs no GPU.

Reports registers, spills, shared memory and the width of global loads, read from the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vgs_kernels import rows_triton

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_NO_CAPS = {"STUDENT_CAP": False, "TARGET_CAP": False}
_CAPS = {"STUDENT_CAP": True, "TARGET_CAP": True}
#: Kernel -> (compile-time options, dtype of the logits, dtype of their gradient) in use. Projected logits are float32
#: and may be capped; logits that the caller holds are of any dtype, which their gradient shares.
VARIANTS = {
    "statistics_kernel": [
        ({"FOUR": four, **caps}, logits, "fp32")
        for four in (True, False)
        for caps, logits in ((_NO_CAPS, "fp32"), (_CAPS, "fp32"), (_NO_CAPS, "bf16"))
    ],
    "gradient_kernel": [
        ({"FOUR": four, "PRIOR": prior, "ADD": add, **caps}, logits, gradient)
        for four, prior, add in ((True, False, False), (True, True, False), (False, False, False), (False, False, True))
        for caps, logits, gradient in (
            (_NO_CAPS, "fp32", "fp32"),
            (_NO_CAPS, "fp32", "bf16"),
            (_CAPS, "fp32", "bf16"),
            (_NO_CAPS, "bf16", "bf16"),
        )
        if not (add and logits != gradient)  # only gradients of held logits are added to
    ],
}


@dataclass
class Resources:
    """What one compiled kernel takes. Spills are bytes (NVIDIA) or registers (AMD)."""

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


def _signature(kernel: triton.JITFunction, logits: str, gradient: str, constants: dict[str, Any]) -> dict[str, str]:
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            kinds[name] = "constexpr"
        elif name in ("s_ptr", "t_ptr", "a_ptr", "w_ptr"):
            kinds[name] = f"*{logits}"
        elif name in ("out_ptr", "out_text_ptr"):
            kinds[name] = f"*{gradient}"
        elif name.endswith("_ptr"):
            kinds[name] = "*fp32"
        elif name.endswith("_stride"):
            kinds[name] = "i64"
        else:
            kinds[name] = "i32" if name == "n_columns" else "fp32"
    return kinds


def _nvidia(binary: bytes) -> tuple[int, int, int, int]:
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
    return registers, spills, sum(".128" in load for load in loads), len(loads)


def _amd(assembly: str) -> tuple[int, int, int, int]:
    registers, *spills = (
        int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    )
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly)
    return registers, sum(spills), sum("dwordx4" in load for load in loads), len(loads)


def compile_kernel(name: str, options: dict[str, Any], logits: str, gradient: str, target: str) -> Resources:
    """Compile one kernel as it is launched: aligned pointers and strides."""
    kernel = getattr(rows_triton, name)
    block, warps = {
        "statistics_kernel": (rows_triton.STATISTICS_BLOCK, rows_triton.STATISTICS_WARPS),
        "gradient_kernel": (rows_triton.GRADIENT_BLOCK, rows_triton.GRADIENT_WARPS),
    }[name]
    constants = {**options, "BLOCK": block}
    signature = _signature(kernel, logits, gradient, constants)
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, argument in enumerate(kernel.arg_names)
        if argument.endswith(("_ptr", "_stride")) or argument == "n_columns"
        if not argument.startswith("state")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": warps[TARGETS[target].backend]})
    nvidia = TARGETS[target].backend == "cuda"
    registers, spills, wide, loads = _nvidia(compiled.asm["cubin"]) if nvidia else _amd(compiled.asm["amdgcn"])
    return Resources(name, options, target, logits, gradient, registers, spills, compiled.metadata.shared, wide, loads)


def report(targets: list[str] | None = None) -> list[dict[str, Any]]:
    """Resources of every variant on every target, as dictionaries."""
    return [
        asdict(compile_kernel(name, *variant, target))
        for target in targets or TARGETS
        for name, variants in VARIANTS.items()
        for variant in variants
    ]
