"""What ``torchrun`` starts for test_one_step.py: a plain accelerate loop around ``vgs_step``, on two gloo ranks.

torchrun ... tests/support/one_step_processes.py FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from processes import HANG, engine
from tiny import tiny_model, tiny_processor, tiny_samples
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import vgs.one_step
from vgs import vgs_step
from vgs.models.families import backbone
from vgs.models.wrappers import unwrap
from vgs_kernels import VGSObjective

RANKS, STEPS, PROMPTS = 2, 3, 6
#: Responses to each of six prompts; of the second step those of the last rank are all empty.
RESPONSES = (
    [[[20, 1], [20]], [[21, 22, 23, 1]], [[24]], [[25, 26, 1], []], [[22, 9, 9, 1]], [[8, 1]]],
    [[[9, 1]], [[21, 10]], [[11, 12, 13, 1], [24, 1]], [[]], [[], []], [[]]],
    [[[25]], [[12, 1], [9, 9, 9, 1]], [[24, 1]], [[25, 26, 1]], [[8]], [[22, 23], [10, 1]]],
)


@dataclass(frozen=True)
class Case:
    """Three SGD steps.

    Attributes:
        engine: ``"ddp"`` or ``"fsdp"``.
        objective: of every step.
        reduction: what the loss is the mean over.
        calls: how many share an optimizer step.
        pictures: whether the last rank's samples have images.
        missing: whether the last rank has no samples at all in the last step.
        half: bfloat16 mixed precision.
        lora: modules of the student with LoRA, None for a student trained in full.
        saved: modules of a LoRA student that are trained in full.
        teacher: ``"bare"``, ``"prepared"`` (by accelerate) or ``"sharded"`` (by ``fully_shard``).
        inside: False runs the models outside their wrappers' forward.
    """

    engine: str
    objective: VGSObjective
    reduction: str = "trajectory"
    calls: int = 1
    pictures: bool = True
    missing: bool = False
    half: bool = False
    teacher: str = "bare"
    inside: bool = True
    lora: tuple[str, ...] | None = None
    saved: tuple[str, ...] | None = None


GATED = VGSObjective(lam=0.5, eta=0.5, vds_scope="ranks")
CASES = {
    "ddp": Case("ddp", GATED, pictures=False, missing=True),
    "ddp_calls": Case("ddp", VGSObjective(lam=0.5, vds_scope="trajectory"), "token", calls=3, teacher="prepared"),
    "ddp_half": Case("ddp", GATED, half=True),
    "ddp_outside": Case("ddp", GATED, inside=False),
    "fsdp": Case("fsdp", GATED, pictures=False, missing=True),
    "fsdp_adaptive": Case("fsdp", replace(GATED, schedule="adaptive"), "token", teacher="sharded"),
    "fsdp_lora_head": Case("fsdp", GATED, lora=("q_proj", "lm_head")),
    "fsdp_saved_head": Case("fsdp", GATED, lora=("q_proj",), saved=("lm_head",)),
}


def batches(case: Case, rank: int | None) -> list[list[tuple[list[dict], list[list[list[int]]]]]]:
    """Samples and responses of every call of every step, of one rank or (None) of all in one call."""
    share = PROMPTS // RANKS
    found = []
    for step, responses in enumerate(RESPONSES):
        pairs = list(zip(tiny_samples(PROMPTS), responses, strict=True))
        last = pairs[-share:] if case.pictures else [({**sample, "images": []}, x) for sample, x in pairs[-share:]]
        parts = [*(pairs[first : first + share] for first in range(0, PROMPTS - share, share)), last]
        if case.missing and step == STEPS - 1:
            parts[-1] = []
        if rank is None:
            calls = [[pair for part in parts for pair in part]]
        else:
            calls = [parts[rank][call :: case.calls] for call in range(case.calls)]
        found.append([tuple(map(list, zip(*call, strict=True))) if call else ([], []) for call in calls])
    return found


def count(case: Case, step: int) -> int:
    """Tokens or responses of an optimizer step, of all ranks."""
    lengths = [len(x) for _, answers in batches(case, None)[step] for responses in answers for x in responses]
    return sum(lengths) if case.reduction == "token" else sum(length > 0 for length in lengths)


def train(
    case: Case, student: nn.Module, teacher: nn.Module, optimizer: Any, backward: Callable, rank: int | None, **options
) -> list[float]:
    """The loop; returns the loss of every call."""
    processor, losses = tiny_processor(), []
    ranks = 1 if rank is None else RANKS
    for step, calls in enumerate(batches(case, rank)):
        items = count(case, step) / (ranks * len(calls))
        for number, (samples, responses) in enumerate(calls, start=1):
            waiting = number < len(calls) and hasattr(student, "no_sync")
            with student.no_sync() if waiting else nullcontext():
                output = vgs_step(
                    student,
                    teacher,
                    processor,
                    samples,
                    responses,
                    case.objective,
                    reduction=case.reduction,
                    num_items=items,
                    **options,
                )
                backward(output.loss / len(calls))
            losses.append(output.loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def models(case: Case) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """The same on every rank: student, teacher, optimizer."""
    student = tiny_model(0, tie=case.engine == "ddp")
    if case.lora:
        config = LoraConfig(r=4, target_modules=list(case.lora), modules_to_save=case.saved and list(case.saved))
        student = get_peft_model(student, config)
        torch.manual_seed(2)
        for parameter in student.parameters():  # adapters that do something
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    return student, tiny_model(1, hidden=48).eval(), torch.optim.SGD(student.parameters(), lr=0.05)


def run(case: Case) -> dict[str, Any]:
    """One rank's report."""
    dtypes: set[torch.dtype] = set()
    AcceleratorState._reset_state(True)
    with engine(case.engine):
        accelerator = Accelerator(mixed_precision="bf16" if case.half else "no")
        student, teacher, optimizer = models(case)
        student, optimizer = accelerator.prepare(student, optimizer)
        if case.teacher == "prepared":
            teacher = accelerator.prepare(teacher)
        elif case.teacher == "sharded":
            fully_shard(teacher, mesh=init_device_mesh("cpu", (RANKS,)))
        body = backbone(unwrap(student)).language_model.layers[0].mlp.down_proj
        body.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        outside = mock.patch.object(vgs.one_step, "run_inside", lambda wrapper, task: task())
        with nullcontext() if case.inside else outside:
            losses = train(case, student, teacher, optimizer, accelerator.backward, dist.get_rank())
    return {
        "wrapper": type(student).__name__,
        "losses": losses,
        "dtypes": dtypes,
        "weights": {
            name: getattr(x, "full_tensor", x.clone)().detach() for name, x in unwrap(student).state_dict().items()
        },
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for chosen in sys.argv[2:]:
        faulthandler.dump_traceback_later(HANG, exit=True)
        torch.save(run(CASES[chosen]), folder / f"{chosen}.{dist.get_rank()}.pt")
        print(f"finished {chosen}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
