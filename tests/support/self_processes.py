"""What ``torchrun`` starts for test_copies.py: self-distillation on gloo ranks, and its copy through a checkpoint.

torchrun ... tests/support/self_processes.py FOLDER CASE [CASE ...]
"""

from __future__ import annotations

import faulthandler
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from processes import HANG, engine, whole_weights
from selves import ScriptedSelfTrainer, privileged_samples
from tiny import tiny_model, tiny_processor, trainer_options
from torch.distributed.tensor import DTensor
from trainers import PLAIN_SGD

from vgs.models.averaged import StudentCopy
from vgs.trainers.self_distillation import SelfDistillationConfig

EMA = {"teacher": "ema", "ema_decay": 0.5}
#: engine, and the run's settings; of every rank two micro-batches of two responses a step.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddp_ema": ("ddp", EMA),
    "fsdp_ema": ("fsdp", EMA),
    "fsdp_frozen": ("fsdp", {"teacher": "frozen", "max_tokens_per_pass": 60, "tie": False}),
    "fsdp_live": ("fsdp", {"teacher": "live"}),
    "fsdp_lora": ("fsdp", {**EMA, "lora": True}),
    "fsdp_base": ("fsdp", {"teacher": "frozen", "lora": True}),
}


def run(name: str, folder: Path, *, single: bool = False) -> ScriptedSelfTrainer:
    """Three SGD steps without clipping over the same 8 responses, by two ranks or by one process."""
    kind, settings = CASES[name]
    settings = dict(settings)
    tie, lora = settings.pop("tie", True), settings.pop("lora", False)
    if single:
        settings.pop("max_tokens_per_pass", None)
    batch, accumulation = (8, 1) if single else (2, 2)
    args = trainer_options(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **{**PLAIN_SGD, "max_steps": 3, **settings},
    )
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None
    with nullcontext({}) if single else engine(kind) as options:
        trainer = ScriptedSelfTrainer(
            model=tiny_model(0, tie=tie),
            args=SelfDistillationConfig(**{**args, **options}),
            train_dataset=privileged_samples(8),
            processing_class=tiny_processor(),
            peft_config=peft_config,
        )
        trainer.train()
    return trainer


def teacher_weights(trainer: ScriptedSelfTrainer) -> dict[str, torch.Tensor]:
    """The weights that the teacher runs with, whole."""
    with trainer.copy.in_place(trainer.student):
        return whole_weights(trainer)


def survives(trainer: ScriptedSelfTrainer, folder: Path) -> bool:
    """Whether a checkpoint's copy comes back as it was, to every shard."""
    folder.mkdir(exist_ok=True)
    copy = trainer.copy
    copy.save(folder, write=dist.get_rank() == 0)
    dist.barrier()
    if not copy.taken:
        return not any(folder.iterdir())
    again = StudentCopy(copy.source, copy.decay)
    again.load(folder, trainer.student)
    pairs = [(again._kept[name], kept) for name, kept in copy._kept.items()]
    return all(
        torch.equal(*(x.to_local() if isinstance(x, DTensor) else x for x in pair))
        and getattr(pair[0], "placements", None) == getattr(pair[1], "placements", None)
        for pair in pairs
    )


if __name__ == "__main__":
    output = Path(sys.argv[1])
    dist.init_process_group("gloo")
    for chosen in sys.argv[2:]:
        faulthandler.dump_traceback_later(HANG, exit=True)
        finished = run(chosen, output / chosen)
        kept = (finished.copy._kept or {}).values()
        report = {
            "engine": finished.accelerator.distributed_type.value,
            "weights": whole_weights(finished),
            "held": teacher_weights(finished),
            "again": whole_weights(finished),
            "kept": sum(x.to_local().numel() if isinstance(x, DTensor) else x.numel() for x in kept),
            "survives": survives(finished, output / f"{chosen}.copy"),
            "losses": [entry["loss"] for entry in finished.state.log_history if "loss" in entry],
        }
        torch.save(report, output / f"{chosen}.{dist.get_rank()}.pt")
        print(f"finished {chosen}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
