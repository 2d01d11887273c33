"""What ``torchrun`` starts for test_verl_engine.py: verl's engine, as its registry gives it, on some gloo ranks.

torchrun ... tests/hosts/verl/verl_engine.py MODELS RESULTS CASE [CASE ...]
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Case:
    """One mini-batch through an engine.

    Attributes:
        micro: rows of a micro-batch; None: verl's dynamic batches.
        options: of VGS, beside the teacher and the objective.
        rows: of the whole mini-batch.
        lora: the rank of an adapter, 0 for none.
    """

    micro: int | None = 4
    options: dict[str, Any] = field(default_factory=dict)
    rows: int = 8
    lora: int = 0


CASES = {
    "all": Case(micro=8),
    "two": Case(micro=2),
    "one": Case(micro=1),
    "dynamic": Case(micro=None),
    "token": Case(micro=2, options={"loss_reduction": "token", "teacher_placement": "whole", "teacher_offload": True}),
    "apart": Case(micro=2, options={"share_prompts": False}),
    "opd": Case(micro=2, options={"objective": "opd"}),
    "hybrid": Case(micro=2, options={"policy_coefficient": 0.3, "loss_reduction": "token"}),
    "plain": Case(micro=2),  # verl's own engine and policy loss
    "lora": Case(micro=2, lora=4),
    "half": Case(micro=4, options={"teacher_dtype": "bfloat16"}),
}


def engine(folder: Path, name: str) -> Any:
    """The engine that verl's registry gives for a case."""
    case = CASES[name]
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    options = {"teacher": str(folder / "teacher"), "objective": KNOBS, "teacher_dtype": "float32", **case.options}
    os.environ["VGS_OPTIONS"] = json.dumps(options)
    dtype = "bf16" if name == "half" else "fp32"
    model = HFModelConfig(
        path=str(folder / "student"),
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "sdpa"},
        lora_rank=case.lora,
        target_modules=["q_proj", "v_proj"] if case.lora else None,
    )
    model.hf_config._attn_implementation = "sdpa"
    if name == "plain":  # verl registers its own for GPUs alone
        from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead as make
    else:
        make = EngineRegistry.get_engine_cls("language_model", "fsdp2")
    made = make(
        model_config=model,
        engine_config=FSDPEngineConfig(
            strategy="fsdp2", use_torch_compile=False, mixed_precision={"param_dtype": dtype, "reduce_dtype": "fp32"}
        ),
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=4, clip_grad=1e9),
        checkpoint_config=CheckpointConfig(),
    )
    made.initialize()
    return made


def policy_loss() -> Any:
    """verl's own PPO loss with its defaults, as the actor worker makes it."""
    from functools import partial

    from verl.workers.config import FSDPActorConfig
    from verl.workers.utils.losses import ppo_loss

    config = FSDPActorConfig(strategy="fsdp2", rollout_n=2, ppo_micro_batch_size_per_gpu=2, entropy_coeff=0.0)
    return partial(ppo_loss, config)


def run(folder: Path, name: str) -> dict[str, Any]:
    """One rank's report."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils as tu

    case, ranks, rank = CASES[name], dist.get_world_size(), dist.get_rank()
    made = engine(folder, name)
    rows, masks = rows_of(folder, made.module)
    share = case.rows // ranks
    found = columns(rows, masks, list(range(rank * share, (rank + 1) * share)))
    nested = {
        key: torch.nested.as_nested_tensor(value, layout=torch.jagged) if isinstance(value[0], torch.Tensor) else value
        for key, value in found.items()
    }
    settings = {"temperature": 1.0, "global_batch_size": case.rows, "use_remove_padding": False}
    if case.micro is None:
        settings |= {"use_dynamic_bsz": True, "max_token_len_per_gpu": 40}
    else:
        settings |= {"use_dynamic_bsz": False, "micro_batch_size_per_gpu": min(case.micro, share)}
    data: TensorDict = tu.get_tensordict(nested, settings)
    with made.train_mode():
        made.optimizer_zero_grad()
        out = made.forward_backward_batch(data, loss_function=policy_loss())
        gradients = {
            key: p.grad.full_tensor().clone() for key, p in made.module.named_parameters() if p.grad is not None
        }
        norm = made.optimizer_step()
    return {
        "engine": type(made).__name__,
        "losses": out["loss"],
        "metrics": {key: [float(v) for v in x.values] for key, x in out["metrics"].items() if hasattr(x, "values")},
        "gradients": gradients,
        "norm": float(norm),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    dist.init_process_group("gloo")
    import cpu_platform  # noqa: F401  (chooses the platform)
    from verl_batches import KNOBS, columns, rows_of

    models, results = Path(sys.argv[1]), Path(sys.argv[2])
    for chosen in sys.argv[3:]:
        torch.save(run(models, chosen), results / f"{chosen}.{dist.get_world_size()}.{dist.get_rank()}.pt")
        print(f"finished {chosen}", file=sys.stderr, flush=True)
    dist.barrier()
    dist.destroy_process_group()
