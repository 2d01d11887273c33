"""Values and gradients of two hundred calls, recorded once: a change of the code must not change the numbers unnoticed.

Of every tensor that a call returns, three numbers are kept: a hash of its bits, its norm, and its product with a random
vector. Equal hashes are equal bits, on the machine that recorded them; elsewhere the other two agree to rounding.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("recorded.json")
#: Allowed errors of a product, relative to the norm, by the dtype of the inputs: 16-bit gradients were rounded twice.
TOLERANCES = {"float64": 1e-10, "float32": 3e-5, "bfloat16": 1e-2}
#: Values are no better than the float32 logits they come from.
FLOORS = {"float64": 1e-13, "float32": 3e-6, "bfloat16": 3e-6}

Digest = tuple[str, float, float]


def digest(x: Tensor) -> Digest:
    """(hash, norm, product with a vector drawn from a seed) of one tensor."""
    bits = hashlib.sha1(x.cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:8]
    values = x.double().cpu().flatten()
    vector = torch.randn(len(values), generator=torch.Generator().manual_seed(len(values)), dtype=torch.float64)
    return bits, float(f"{values.norm().item():.12g}"), float(f"{(values @ vector).item():.12g}")


def recorded() -> dict[str, dict[str, Digest]]:
    """What the file holds, by case and by tensor."""
    return json.loads(PATH.read_text())


def write() -> None:
    """Record all cases with the code as it is."""
    from .cases import cases

    found = {case.key: {name: digest(x) for name, x in case.run().items()} for case in cases()}
    lines = (f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in found.items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(key: str, found: dict[str, Digest], expected: dict[str, Digest]) -> list[str]:
    """What of one case is not as it was recorded, beyond rounding."""
    dtype = key.split(" | ")[2]
    tolerance, floor = TOLERANCES[dtype], FLOORS[dtype]
    wrong = [f"{key}: {name} is missing" for name in expected if name not in found]
    for name, (_, norm, product) in expected.items():
        if name in found:
            allowed = tolerance * norm + floor
            for ours, theirs in zip(found[name][1:], (norm, product), strict=True):
                if not abs(ours - theirs) <= allowed:
                    wrong.append(f"{key}: {name} is {ours}, was {theirs} +- {allowed:.1e}")
    return wrong


def compare() -> str:
    """How many tensors are equal to the last bit, and to rounding, by loss and backend."""
    from .cases import cases

    expected, counts, wrong = recorded(), {}, []
    for case in cases():
        found = {name: digest(x) for name, x in case.run().items()}
        wrong += differences(case.key, found, expected[case.key])
        count = counts.setdefault(f"{case.loss}, {case.key.split(' | ')[2]}, {case.backend}", [0, 0])
        for name, (bits, *_) in expected[case.key].items():
            count[name not in found or found[name][0] != bits] += 1
    lines = [f"{key}: {same} to the last bit, {close} not" for key, (same, close) in sorted(counts.items())]
    return "\n".join([*lines, *wrong, f"{len(wrong)} beyond rounding"])
