"""What ``torchrun`` starts for test_processes.py: whole runs under DDP, FSDP2 and ZeRO-3, on gloo, and short others.

    torchrun ... tests/support/processes.py FOLDER CASE [CASE ...]

Accelerate takes FSDP2 and ZeRO-3 to devices only, so that the CPU is shown to it as one; from there on all is its own.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from grpo_runs import RUNS as GRPO_RUNS
from grpo_runs import grpo_trainer
from tiny import save_tiny_checkpoint, tiny_model, tiny_processor, tiny_samples, trainer_options
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trainers import PLAIN_SGD, ScriptedTrainer, pair_loss
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vgs import VGSConfig
from vgs.models.groups import response_lengths
from vgs.models.wrappers import run_inside

HANG = 120  # seconds that a case may take until all stacks are printed and the worker ends
CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
ENGINE_CONFIGS = {"fsdp": CONFIGS / "fsdp2.yaml", "zero": CONFIGS / "zero3.yaml"}
SILENT = "blue"  # prompts with this word get no response


@dataclass(frozen=True)
class Case:
    """A run of two steps.

    Attributes:
        engine: ``"ddp"``, ``"fsdp"`` or ``"zero"``.
        split: responses per micro-batch and micro-batches per step, of every rank.
        settings: of the run.
        ranks: how many.
        samples: ``"pictures"``, ``"mixed"`` (most without) or ``"silent"`` (the last rank gets no response).
        tie: whether the student's head is its embedding.
        half: bfloat16 mixed precision.
        loaded: the host loads the models.
    """

    engine: str
    split: tuple[int, int]
    settings: dict[str, Any]
    ranks: int = 2
    samples: str = "pictures"
    tie: bool = True
    half: bool = False
    loaded: bool = False

    @property
    def responses(self) -> int:
        return self.ranks * self.split[0] * self.split[1]


# A quantile over a call spans one micro-batch, and one over ranks one of each: only runs without accumulation can
# equal a single process there.
TRAJECTORY = {"eta": 0.5, "loss_reduction": "trajectory", "vds_scope": "trajectory"}
RANKS = {"eta": 0.5, "loss_reduction": "token", "vds_scope": "ranks", "schedule": "adaptive"}
LOOKING = {"save_samples": 2, "geometry_every": 1}  # the main process alone, while the others wait
MIXED = {"split": (1, 4), "settings": TRAJECTORY, "samples": "mixed"}
GENERATIONS = {"split": (2, 2), "settings": {**TRAJECTORY, "num_generations": 2}}
BUDGET = {
    "split": (4, 1),
    "settings": {**RANKS, "max_tokens_per_pass": 70, "gradient_checkpointing": True, "log_terms_by_bin": 3},
    "tie": False,
}
SILENCE = {
    "split": (4, 1),
    "settings": {**RANKS, "max_tokens_per_pass": 90, "shuffle_dataset": False, "lp_every": 2, "log_terms_by_bin": 2},
    "samples": "silent",
    "tie": False,
}
HALF = {"split": (4, 1), "settings": {**RANKS, "max_tokens_per_pass": 70}, "tie": False, "half": True}
WEIGHED = {"split": (2, 2), "settings": {**TRAJECTORY, "num_generations": 2, "preset": "va_opd"}}
PRIOR = {"split": (2, 2), "settings": {**TRAJECTORY, "prior": "ema", "prior_decay": 0.5}, "tie": False}
THREE = {**SILENCE, "ranks": 3, "split": (2, 1), "settings": {**SILENCE["settings"], "max_tokens_per_pass": 70}}
CASES = {
    "ddp_mixed": Case("ddp", **MIXED),
    "ddp_generations": Case("ddp", **{**GENERATIONS, "settings": {**GENERATIONS["settings"], "eta": "measure"}}),
    "ddp_budget": Case("ddp", **{**BUDGET, "settings": {**BUDGET["settings"], "eta": "measure", **LOOKING}}),
    "ddp_silent": Case("ddp", **SILENCE),
    "ddp_weighed": Case("ddp", **WEIGHED),
    "ddp_prior": Case("ddp", **PRIOR),
    "fsdp_mixed": Case("fsdp", **MIXED),
    "fsdp_generations": Case("fsdp", **{**GENERATIONS, "settings": {**GENERATIONS["settings"], "eta": "exact"}}),
    "fsdp_budget": Case("fsdp", **{**BUDGET, "settings": {**BUDGET["settings"], "eta": "measure"}}),
    "fsdp_silent": Case("fsdp", **SILENCE),
    "fsdp_half": Case("fsdp", **HALF),
    "fsdp_loaded": Case("fsdp", (2, 2), TRAJECTORY, loaded=True),
    "fsdp_weighed": Case("fsdp", **WEIGHED),
    "fsdp_prior": Case("fsdp", **PRIOR),
    "zero_mixed": Case("zero", **MIXED),
    "zero_generations": Case("zero", **{**GENERATIONS, "settings": {**GENERATIONS["settings"], "eta": "cheap"}}),
    "zero_budget": Case("zero", **BUDGET),
    "zero_silent": Case("zero", **SILENCE),
    "zero_loaded": Case("zero", (2, 2), TRAJECTORY, loaded=True),
    "ddp_three": Case("ddp", **THREE),
    "fsdp_three": Case("fsdp", **THREE),
}
#: One of each kind; the others are more of the same.
QUICK = (
    *("ddp_mixed", "ddp_generations", "ddp_budget", "ddp_silent"),
    *("fsdp_mixed", "fsdp_budget", "fsdp_silent", "fsdp_half", "fsdp_prior"),
)


def make_samples(case: Case) -> list[dict]:
    """As many as a step takes, in the order of the ranks."""
    samples = tiny_samples(case.responses)
    if case.samples == "mixed":
        return [sample if index in (0, 5) else {**sample, "images": []} for index, sample in enumerate(samples)]
    if case.samples == "silent":
        last = case.responses - case.responses // case.ranks
        samples[last] = {**samples[last], "images": []}
        question = [{"role": "user", "content": f"{SILENT} ?"}]
        return [*samples[:last], *({**sample, "prompt": question} for sample in samples[last:])]
    return samples


class ProcessTrainer(ScriptedTrainer):
    """Some prompts get no response, and every repeated one another; notes what its step was made of."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.notes: list[dict[str, Any]] = []
        self.dtypes: set[torch.dtype] = set()
        self._plan, self._pass = self.step_scorer.micro_batch, self.step_scorer.pass_loss
        self.step_scorer.micro_batch, self.step_scorer.pass_loss = self._noted, self._watched_pass

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False) -> list[list[int]]:
        responses = super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)
        count = self.args.num_generations
        return [[8 + index % count, *response] for index, response in enumerate(responses)]

    def sample(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # Later than in sampling, because the host itself fails on an empty response.
        batch = super().sample(inputs)
        word = self._tokenizer.convert_tokens_to_ids(SILENT)
        groups = [
            replace(group, responses=tuple(x[:0] for x in group.responses)) if word in group.prompt_ids else group
            for group in batch["groups"]
        ]
        if self.args.loss_reduction == "token":
            count = torch.tensor([sum(response_lengths(groups))])
            batch["num_items_in_batch"] = self.accelerator.gather(count).sum()
        return {**batch, "groups": groups}

    def _noted(self, *args: Any, **options: Any) -> Any:
        batch = self._plan(*args, **options)
        student = self.accelerator.unwrap_model(self.model)
        self.notes.append(
            {
                "held": sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in student.parameters()),
                "passes": [len(chosen) for chosen in batch.passes],
                "images": any(group.has_images for group in batch.groups),
                "tokens": sum(response_lengths(batch.groups)),
                "text_gradient": batch.text_gradient,
                "limits": None if batch.limits is None else batch.limits.tolist(),
            }
        )
        return batch

    def _watched_pass(self, student: torch.nn.Module, batch: Any, chosen: list[int]) -> Any:
        loss, output = self._pass(student, batch, chosen)
        scores = [part.vds for part in batch.teacher if part.vds is not None]
        limits = [] if batch.limits is None else [batch.limits]
        self.dtypes |= {x.dtype for x in (*batch.weights, *limits, *scores, loss, output.loss)}
        return loss, output


def parse_launch(config: Path, *arguments: str) -> argparse.Namespace:
    """What ``accelerate launch`` makes of a config and arguments."""
    options = ["--config_file", str(config), *arguments, "-m", "vgs.cli"]
    settings, given, _ = _validate_launch_command(launch_command_parser().parse_args(options))
    settings.deepspeed_fields_from_accelerate_config = ",".join(given.deepspeed_config)
    return settings


def launch_environment(config: Path, *arguments: str) -> dict[str, str]:
    """What it then tells the processes about their engine."""
    settings = parse_launch(config, *arguments)
    if settings.use_deepspeed:
        _, environment = prepare_deepspeed_cmd_env(settings)
    elif settings.num_processes > 1:
        environment = prepare_multi_gpu_env(settings)
    else:
        _, environment = prepare_simple_launcher_cmd_env(settings)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


@contextmanager
def engine(name: str) -> Iterator[dict[str, Any]]:
    """Trainers made inside run on this engine, given the settings that it yields."""
    config = ENGINE_CONFIGS.get(name)
    told = launch_environment(config, "--mixed_precision", "no") if config else {}
    shown = DistributedType.MULTI_GPU if name == "fsdp" else DistributedType.MULTI_CPU
    with (
        mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", shown)),
        mock.patch.dict(os.environ, {**told, "ACCELERATE_TORCH_DEVICE": "cpu"}),
    ):
        if name != "zero":
            yield {}
            return
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile
        # As tiny as they are, all parameters are to be sharded, and SGD is an optimizer that DeepSpeed has not seen.
        with mock.patch.object(DeepSpeedPlugin, "__post_init__", _shard_all(DeepSpeedPlugin.__post_init__)):
            yield {"use_cpu": False}
        unset_hf_deepspeed_config()  # models made later would be sharded from the start, with other weights


def _shard_all(original: Callable[[DeepSpeedPlugin], None]) -> Callable[[DeepSpeedPlugin], None]:
    def complete(plugin: DeepSpeedPlugin) -> None:
        original(plugin)
        plugin.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        plugin.hf_ds_config.config["zero_allow_untested_optimizer"] = True

    return complete


def run(case: Case, folder: Path, *, single: bool = False) -> ProcessTrainer:
    """Two SGD steps without clipping: as the case says, or by one process in one pass without shared prompts."""
    settings = dict(case.settings)
    batch, accumulation = case.split
    if single:
        settings.pop("max_tokens_per_pass", None)
        settings["share_prefix"] = False
        batch, accumulation = case.responses, 1
    args = trainer_options(
        folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        bf16=case.half,
        **{**PLAIN_SGD, **settings},
    )
    models = {"student": {"seed": 0, "tie": case.tie}, "teacher": {"seed": 1, "hidden": 48}}
    if case.loaded and int(os.environ.get("RANK", 0)) == 0:
        for name, options in models.items():
            save_tiny_checkpoint(folder / name, **options)
    if case.loaded and not single:
        dist.barrier()
    student, teacher = (
        str(folder / name) if case.loaded else tiny_model(**options) for name, options in models.items()
    )
    with nullcontext({}) if single else engine(case.engine) as options:
        trainer = ProcessTrainer(
            model=student,
            teacher_model=teacher,
            args=VGSConfig(**{**args, **options}),
            train_dataset=make_samples(case),
            processing_class=tiny_processor(),
        )
        trainer.train()
    return trainer


def whole_weights(trainer: ProcessTrainer) -> dict[str, torch.Tensor]:
    """The student's weights, gathered from all ranks."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    gathering = nullcontext()
    if trainer.is_deepspeed_enabled:
        import deepspeed

        gathering = deepspeed.zero.GatheredParameters(list(student.parameters()))
    with gathering:
        weights = student.state_dict()
        return {name: getattr(x, "full_tensor", x.clone)() for name, x in weights.items()}


def distilled(name: str, folder: Path) -> dict[str, Any]:
    """What a rank reports of one of ``CASES``."""
    finished = run(CASES[name], folder)
    return {
        "engine": (finished.accelerator.distributed_type.value, type(finished.model_wrapped).__name__),
        "notes": finished.notes,
        "dtypes": finished.dtypes,
        "logs": finished.state.log_history,
        "ratios": finished.steering.ratios,
        "weights": whole_weights(finished),
    }


def reinforced(name: str, folder: Path) -> dict[str, Any]:
    """What a rank reports of one of ``grpo_runs.RUNS``, after ``"grpo_"``."""
    with engine("ddp"):
        finished = grpo_trainer(folder, per_device_train_batch_size=4, **GRPO_RUNS[name.removeprefix("grpo_")])
        finished.train()
    return {"weights": whole_weights(finished), "logs": finished.state.log_history}


def sharded_gradients() -> dict[str, torch.Tensor]:
    """Gradients of the loss through a student sharded by FSDP2, gathered."""
    student = tiny_model(0, tie=False)
    fully_shard(student, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    loss, _ = run_inside(student, lambda: (pair_loss(student), None))
    loss.backward()
    return {name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    output = Path(sys.argv[1])
    gc.freeze()  # every training begins with a garbage collection
    dist.init_process_group("gloo")
    for chosen in sys.argv[2:]:
        faulthandler.dump_traceback_later(HANG, exit=True)  # starts anew for every case
        if chosen == "sharded":
            report = sharded_gradients()
        else:
            report = (distilled if chosen in CASES else reinforced)(chosen, output / chosen)
        torch.save(report, output / f"{chosen}.{dist.get_rank()}.pt")
        print(f"finished {chosen}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
