"""What the stand-in device does, in one process, as JSON: its values, what it notices, and how exact bfloat16 is there.

python -m tests.emulation.device.build -m tests.emulation.device.probe
"""

from __future__ import annotations

import json
from typing import Any

import torch
from oracle import vgs_oracle
from problems import evaluate, make_problem, relative_error

from vgs_kernels import PolicyTerm, VGSObjective, fused_linear_divergence, fused_linear_vgs_loss

from ..triton_device import BadLaunch, Device, install
from .call_matrix import make_inputs
from .record import move_at_most, record
from .values import CPUValues, use_no_other_library

OBJECTIVE = VGSObjective(lam=0.1)


def products() -> dict[str, float]:
    """Errors of 16-bit products and sums in ulp of the exact result: half an ulp is one rounding."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(64, 64, generator=generator).bfloat16() for _ in range(3))
    exact = a.double() @ b.double() + c.double()
    found = torch.addmm(c.cuda(), a.cuda(), b.cuda()).cpu().double()
    wide = torch.addmm(c.float().cuda(), a.cuda(), b.cuda(), out_dtype=torch.float32).cpu().double()
    power = torch.exp2(torch.floor(torch.log2(exact.abs())))
    return {
        "bfloat16": ((found - exact).abs() / power / 2**-7).max().item(),
        "float32": ((wide - exact).abs() / power / 2**-23).max().item(),
    }


def counted(device: Device) -> dict[str, Any]:
    """Whether waits, launches, products and wrong pointers are seen."""
    x = torch.ones(8, 8, device="cuda")
    rows = {
        "nothing": record(device, lambda: x.view(64)),
        "item": record(device, lambda: x.sum().item()),
        "product": record(device, lambda: x @ x),
    }
    return {name: found.counts() for name, found in rows.items()}


def refused() -> str:
    """What a kernel says to memory of the host."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(pointer):
        tl.store(pointer, 1.0)

    try:
        kernel[(1,)](torch.zeros(1))
    except BadLaunch as error:
        return str(error)
    return ""


def errors_of_bfloat16() -> dict[str, dict[str, float]]:
    """Relative error of each gradient against float64 on the same 16-bit inputs, on the CPU and on the device."""
    problem = make_problem(96, 997, 48, 64, device="cpu").to(dtype=torch.bfloat16)
    exact = evaluate(vgs_oracle, problem, dtype=torch.float64, objective=OBJECTIVE)
    found = {}
    for place, backend in (("cpu", "torch"), ("cuda", "triton")):
        ours = evaluate(fused_linear_vgs_loss, problem.to(device=place), objective=OBJECTIVE, backend=backend)
        found[place] = {name: relative_error(x.cpu(), exact.gradients[name]) for name, x in ours.gradients.items()}
    return found


def compiled_again(device: Device) -> list[str]:
    """Kernels that are compiled for other numbers of tokens, after a first call of each form."""
    device.execute = False
    move_at_most(0)
    loaded: list[str] = []
    for index, tokens in enumerate((512, 1, 16, 17, 1000)):
        x = make_inputs(torch.bfloat16, ("student", "student_text", "student_weight"), tokens)
        found = record(device, lambda x=x: fused_linear_vgs_loss(*x).loss.backward())
        target = [(1.0, x.teacher, x.teacher_weight)]
        for name in ("reverse_kl", "jsd"):
            other = record(
                device,
                lambda x=x, t=target, n=name: fused_linear_divergence(x[0], x[2], t, divergence=n).loss.backward(),
            )
            found.loaded += other.loaded
        ids, ones = torch.zeros(tokens, dtype=torch.int64, device="cuda"), torch.ones(tokens, device="cuda")
        options = {"target_ids": ids, "policy": PolicyTerm(ones, ones, ones), "divergence": "sampled_reverse_kl"}
        other = record(
            device, lambda x=x, t=target, o=options: fused_linear_divergence(x[0], x[2], t, **o).loss.backward()
        )
        found.loaded += other.loaded
        loaded += found.loaded if index else []
    return loaded


def main() -> None:
    device = install(Device(kind="cuda"))
    use_no_other_library()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "counted": counted(device), "refused": refused()}
    with CPUValues():
        found |= {"products": products(), "bfloat16": errors_of_bfloat16()}
        found["executed"] = len(device.launches)
    print(json.dumps(found | {"compiled again": compiled_again(device)}))


if __name__ == "__main__":
    main()
