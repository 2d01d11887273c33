"""Every form of call at full size on the stand-in device: nothing is executed, everything is counted.

    python -m tests.emulation.device.build -m tests.emulation.device.call_matrix [--record] [--json]

``expected.json`` holds the counts; ``--record`` writes them anew.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgs_kernels import (
    PolicyTerm,
    VGSObjective,
    divergence_loss,
    fused_linear_divergence,
    fused_linear_vgs_loss,
    vgs_loss,
)

from ..triton_device import Device, install
from .record import Record, move_at_most, record

EXPECTED = Path(__file__).parent / "expected.json"
TOKENS, VOCAB, STUDENT, TEACHER = 8192, 151_936, 2048, 4096
#: Of given logits, which take memory for every entry.
DENSE_TOKENS = 1024
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Inputs(NamedTuple):
    student: Tensor
    student_text: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_text: Tensor
    teacher_weight: Tensor


def make_inputs(dtype: torch.dtype, trainable: tuple[str, ...], tokens: int = TOKENS) -> Inputs:
    """Tensors of the sizes of an 8B teacher and a 2B student; nothing has been written to them."""
    sizes = [(tokens, STUDENT), (tokens, STUDENT), (VOCAB, STUDENT), (tokens, TEACHER), (tokens, TEACHER)]
    tensors = [torch.empty(size, device="cuda", dtype=dtype) for size in (*sizes, (VOCAB, TEACHER))]
    return Inputs(*(x.requires_grad_(name in trainable) for name, x in zip(Inputs._fields, tensors, strict=True)))


def _vgs(**options: Any) -> Callable[[Inputs], Any]:
    return lambda x: fused_linear_vgs_loss(*x, **options)


def _divergence(**options: Any) -> Callable[[Inputs], Any]:
    return lambda x: fused_linear_divergence(
        x.student, x.student_weight, [(1.0, x.teacher, x.teacher_weight)], **options
    )


def _ids(x: Inputs) -> Tensor:
    return torch.zeros(len(x.student), dtype=torch.int64, device="cuda")


def _policy(x: Inputs) -> dict[str, Any]:
    ones = torch.ones(len(x.student), device="cuda")
    return {"target_ids": _ids(x), "policy": PolicyTerm(advantages=ones, weights=ones, old_logps=ones)}


def _biased(x: Inputs) -> Any:
    student, teacher = (torch.zeros(VOCAB, device="cuda", dtype=x.student.dtype) for _ in range(2))
    return fused_linear_vgs_loss(*x, student_bias=student.requires_grad_(), teacher_bias=teacher)


def _three_rows(x: Inputs) -> Any:
    target = [(2.0, x.teacher, x.teacher_weight), (-1.0, x.teacher_text, x.teacher_weight)]
    options = {"divergence": "forward_kl", "support": "plausible", "plausibility": 0.1}
    return fused_linear_divergence(x.student, x.student_weight, target, **options)


def _dense_rows(x: Inputs) -> list[Tensor]:
    rows = [torch.empty(DENSE_TOKENS, VOCAB, device="cuda", dtype=x.student.dtype) for _ in range(4)]
    return [row.requires_grad_(index < 2) for index, row in enumerate(rows)]


def _dense_divergence(x: Inputs) -> Any:
    student, _, teacher, _ = _dense_rows(x)
    return divergence_loss(student, [(1.0, teacher)])


class Form(NamedTuple):
    """A way to call: what it does, and which inputs require grad."""

    call: Callable[[Inputs], Any]
    trainable: tuple[str, ...] = ("student", "student_text", "student_weight")


_TOP_K = {"support": "student_top_k", "top_k": 64}
FORMS = {
    "VGS": Form(_vgs()),
    "VGS, bias": Form(_biased),
    "VGS, soft-cap": Form(_vgs(student_softcap=30.0, teacher_softcap=30.0)),
    "VGS, policy term": Form(lambda x: fused_linear_vgs_loss(*x, **_policy(x))),
    "VGS, live prior": Form(_vgs(objective=VGSObjective(detach_prior=False))),
    "VGS, adaptive": Form(_vgs(objective=VGSObjective(schedule="adaptive"))),
    "VGS, threshold given": Form(_vgs(vds_threshold=0.1)),
    "VGS, trajectory": Form(
        lambda x: fused_linear_vgs_loss(*x, objective=VGSObjective(vds_scope="trajectory"), trajectory_ids=_ids(x))
    ),
    "VGS, frozen head": Form(_vgs(), ("student", "student_text")),
    "VGS, hidden states alone": Form(_vgs(), ("student",)),
    "VGS, folded": Form(_vgs(objective=VGSObjective(lam=0.0), return_terms=False)),
    "VGS, no gradient": Form(_vgs(), ()),
    "VGS, 128 MiB": Form(_vgs(workspace_bytes=2**27)),
    "reverse KL": Form(_divergence(divergence="reverse_kl")),
    "forward KL": Form(_divergence(divergence="forward_kl")),
    "reverse KL, clipped tokens": Form(_divergence(token_clip=1.0)),
    "sampled reverse KL, policy term": Form(lambda x: _divergence(divergence="sampled_reverse_kl", **_policy(x))(x)),
    "JSD": Form(_divergence(divergence="jsd")),
    "JSD, clipped top-k": Form(_divergence(divergence="jsd", clip=0.05, **_TOP_K)),
    "forward KL, teacher's top-k": Form(_divergence(divergence="forward_kl", support="teacher_top_k", top_k=64)),
    "forward KL, two rows": Form(_three_rows),
    "VGS of logits": Form(lambda x: vgs_loss(*_dense_rows(x))),
    "reverse KL of logits": Form(_dense_divergence),
}


def measure(device: Device, form: Form, dtype: torch.dtype, tokens: int = TOKENS) -> Record:
    """Forward and backward of one form, compiled beforehand: what it takes from then on."""

    def call() -> None:
        out = form.call(inputs)
        if out.loss.requires_grad:
            out.loss.backward()

    found = []
    for _ in range(2):
        gc.collect()
        inputs = make_inputs(dtype, form.trainable, tokens)
        found.append(record(device, call))
    found[1].bad += found[0].bad
    return found[1]


def matrix(forms: dict[str, Form] = FORMS) -> dict[str, Record]:
    """Every form in every dtype."""
    device = install(Device(kind="cuda", execute=False))
    move_at_most(0)
    return {
        f"{name}, {label}": measure(device, form, dtype)
        for label, dtype in DTYPES.items()
        for name, form in forms.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write expected.json")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON alone")
    args = parser.parse_args()
    records = matrix()
    counts = {name: {**found.counts(), "bad": found.bad} for name, found in records.items()}
    if args.json:
        print(json.dumps(counts))
        return 0
    for name, row in counts.items():
        print(
            f"{name:40} {row['kernels']:5} kernels {row['launches']:4} of Triton {row['products']:5} products "
            f"{row['waits']:3} waits {row['loaded']:2} compiled {row['peak_bytes'] / 2**30:6.2f} GiB {row['bad'] or ''}"
        )
    if args.record:
        kept = {name: {key: x for key, x in row.items() if key != "bad"} for name, row in counts.items()}
        EXPECTED.write_text(json.dumps(kept, indent=1) + "\n")
    return int(any(row["bad"] for row in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
