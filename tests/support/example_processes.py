"""What ``torchrun`` starts for test_examples_on_ranks.py: the accelerate example, on two gloo ranks.

torchrun ... tests/support/example_processes.py FOLDER ENGINE [ENGINE ...]
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from example_runs import Recorder, run_example
from processes import HANG, engine

import vgs
from vgs.models.wrappers import unwrap

#: Two optimizer steps of two micro-batches with two questions on each of two ranks.
WORDS = ["--batch_size", "2", "--accumulate", "2", "--epochs", "2", "--learning_rate", "0.05", "--max_new_tokens", "5"]


def run(name: str) -> dict[str, Any]:
    """One rank's report; all of the run but its engine is the example's."""
    AcceleratorState._reset_state(True)
    recorder = Recorder()
    with (
        engine(name),
        mock.patch.object(vgs, "vgs_step", recorder),
        mock.patch.object(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)),
        mock.patch.object(Accelerator, "end_training"),  # it would leave no process group for the next engine
    ):
        student = run_example("accelerate_loop.py", *WORDS, "--out", f"runs/{name}")["student"]
    weights = unwrap(student).state_dict()
    return {
        "wrapper": type(student).__name__,
        "calls": recorder.calls,
        "losses": recorder.losses,
        "weights": {key: getattr(x, "full_tensor", x.clone)().detach() for key, x in weights.items()},
    }


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    dist.init_process_group("gloo")
    for chosen in sys.argv[2:]:
        faulthandler.dump_traceback_later(HANG, exit=True)
        torch.save(run(chosen), Path(f"{chosen}.{dist.get_rank()}.pt"))
        print(f"finished {chosen}", file=sys.stderr, flush=True)
    dist.destroy_process_group()
