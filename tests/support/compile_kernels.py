"""Compiles a covering design of the kernels for all GPU targets and prints what each takes, as JSON.

A script of its own: Triton's interpreter, which other tests need, must be off.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict
from typing import Any

from covering import covering

from benchmarks.kernels import compile_kernel, launches


def factors(launch: tuple[str, Any, str, bool]) -> dict[str, Hashable]:
    """Every choice, for each kernel by itself."""
    kernel, variant, target, aligned = launch
    choices = {**variant.options, "logits": variant.logits, "gradient": variant.gradient}
    return {f"{kernel} {name}": x for name, x in {**choices, "target": target, "aligned": aligned}.items()}


if __name__ == "__main__":
    print(json.dumps([asdict(compile_kernel(*launch)) for launch in covering(launches(), factors)]))
