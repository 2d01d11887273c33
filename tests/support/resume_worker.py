"""Kills tiny training runs with SIGKILL at random moments and resumes them, in forks of one process.

``python resume_worker.py FOLDER SEED PROCESSES KILLS [write] [rename]`` leaves ``FOLDER/whole-R.pt`` of rank R of a run
that nobody killed, ``FOLDER/killedN-R.pt`` of the others, and ``FOLDER/events.json``.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options

from vgs import VGSConfig, VGSTrainer
from vgs.trainers import resume
from vgs.trainers.checkpoints import STAGING

#: Nothing divides anything: epochs of 3 steps, logs after 5, evaluations (which sample) after 4, checkpoints after 2.
OPTIONS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "eval_greedy": False,
    "eta": "measure",
    "eta_batches": 3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 3,
    "max_completion_length": 5,
}
TIMES = ("runtime", "per_second", "step_time")
ATTEMPTS = 16


def build(output_dir: Path, **options) -> VGSTrainer:
    """A trainer whose epochs have three steps."""
    args = VGSConfig(**trainer_options(output_dir, **{**OPTIONS, **options}))
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return VGSTrainer(
        model=tiny_model(0),
        teacher_model=tiny_model(1, hidden=48),
        args=args,
        train_dataset=tiny_samples(3 * batch),
        eval_dataset=tiny_samples(5),
        processing_class=tiny_processor(),
    )


def everything(trainer: VGSTrainer) -> dict[str, Any]:
    """All that a resumed run must share with a whole one."""
    _, keys, *position = np.random.get_state()
    return {
        "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "rng": [torch.get_rng_state(), random.getstate(), keys.tolist(), position],
        "logs": [
            {name: value for name, value in entry.items() if not any(part in name for part in TIMES)}
            for entry in trainer.state.log_history
        ],
        "steering": trainer.steering.state(),
        "counts": [trainer.state.global_step, trainer.state.epoch, trainer.state.num_input_tokens_seen],
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
    }


def differences(actual: Any, expected: Any, where: str = "") -> list[str]:
    """Where two nested results are not the same, bit for bit."""
    if isinstance(expected, torch.Tensor):
        same = actual.dtype == expected.dtype and torch.equal(actual, expected)
        return [] if same else [where]
    if isinstance(expected, dict):
        if actual.keys() != expected.keys():
            return [f"{where}: keys {sorted(map(str, actual.keys() ^ expected.keys()))}"]
        return [line for key in expected for line in differences(actual[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, (list, tuple)):
        if len(actual) != len(expected):
            return [f"{where}: {len(actual)} entries, expected {len(expected)}"]
        pairs = enumerate(zip(actual, expected, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{where}/{index}")]
    same = repr(actual) == repr(expected)  # tells -0.0 from 0.0, and takes NaN for NaN
    return [] if same else [f"{where}: {actual!r}, expected {expected!r}"]


def slow_down(step: str, marker: Path) -> None:
    """Makes one step of a save last until the process is killed, once something is written."""

    def wait(*args: Any) -> None:
        marker.touch()
        time.sleep(600)

    if step == "write":
        write = torch.save

        def save(value: Any, path: Any, *args: Any) -> None:
            if STAGING in str(path) and str(path).endswith("optimizer.pt"):
                Path(path).write_bytes(b"half of it")
                wait()
            write(value, path, *args)

        torch.save = save
    else:
        resume.appear = wait


def train(output_dir: Path, result: Path, slow: str | None) -> None:
    """One process of a run; ``result`` gets ``-RANK.pt`` appended."""
    if slow is not None:
        slow_down(slow, output_dir.with_suffix(".saving"))
    trainer = build(output_dir, max_steps=12 // int(os.environ.get("WORLD_SIZE", "1")))
    trainer.train(resume_from_checkpoint=True)
    partial = result.with_name(f"{result.name}-{trainer.args.process_index}.partial")
    torch.save(everything(trainer), partial)
    os.replace(partial, partial.with_suffix(".pt"))


def start(processes: int, *args: Any) -> list[int]:
    """Forks the processes of a run; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                os.environ.update({name: str(value) for name, value in {**address, **ranks}.items()})
            try:
                train(*args)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    return children


def finish(children: list[int]) -> None:
    """Waits for a run that must succeed."""
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), codes


def kill(children: list[int]) -> bool:
    """SIGKILL to all; whether any was still running."""
    for child in children:
        os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert 1 not in codes, codes
    return -signal.SIGKILL in codes


def main(folder: Path, seed: int, processes: int, kills: int, saving: list[str]) -> None:
    """Kills a run once within each step of a save that is in ``saving``, then ``kills`` times at random."""
    gc.freeze()  # the forks share what is imported, and their garbage collections leave it alone
    events: list[str] = []
    draw = random.Random(seed)
    began = time.monotonic()
    finish(start(processes, folder / "whole", folder / "whole", None))
    duration = time.monotonic() - began

    for step in saving:
        marker = (folder / "run").with_suffix(".saving")
        children = start(processes, folder / "run", folder / "never", step)
        while not marker.exists():
            time.sleep(0.01)
            assert os.waitpid(children[0], os.WNOHANG)[0] == 0, "the run ended before it saved"
        marker.unlink()
        assert kill(children)
        events.append(f"saving: {step}")
    left, runs = kills, 0
    for _ in range(ATTEMPTS):
        if left == 0:
            break
        delay = draw.uniform(0.2, 0.7) * duration
        children = start(processes, folder / "run", folder / f"killed{runs}", None)
        time.sleep(delay)
        if kill(children):
            left -= 1
            newest = sorted(path.name for path in (folder / "run").glob("checkpoint-*"))
            events.append(f"random: {delay:.2f} of {duration:.2f} s, left {newest}")
        else:  # it was faster
            os.rename(folder / "run", folder / f"run{runs}")
            runs += 1
    finish(start(processes, folder / "run", folder / f"killed{runs}", None))
    (folder / "events.json").write_text(json.dumps(events, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]), sys.argv[5:])
