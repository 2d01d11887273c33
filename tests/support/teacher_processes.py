"""Two SGD steps with two teachers and recorded responses, on one process or several.

``torchrun teacher_processes.py FOLDER`` leaves ``FOLDER/NAME-R.pt`` of each run and rank R: weights and log.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import tiny_model, tiny_processor, tiny_samples, trainer_options
from trainers import PLAIN_SGD, ScriptedTrainer

from vgs import VGSConfig

#: Of the two ranks' prompts the first has one domain alone, and the second both.
DOMAINS = ("math", "math", "math", "math", "charts", "math", "charts", "charts")
RUNS = {"recorded": 0.0, "mixed": 0.5, "sampled": 1.0}


def run(name: str, folder: Path, ranks: int, rank: int) -> None:
    """One of ``RUNS`` over eight samples, however many processes there are."""
    samples = [
        {**sample, "domain": domain, "responses": [[20 + index % 3, *range(8, 9 + index % 4), 1]]}
        for index, (sample, domain) in enumerate(zip(tiny_samples(8), DOMAINS, strict=True))
    ]
    options = PLAIN_SGD | {"per_device_train_batch_size": 8 // ranks, "eta": 0.5, "vds_scope": "ranks"}
    args = trainer_options(folder / name, teacher_column="domain", on_policy_fraction=RUNS[name], **options)
    trainer = ScriptedTrainer(
        model=tiny_model(0),
        teacher_model={"math": tiny_model(1, hidden=48), "charts": tiny_model(2, hidden=64)},
        args=VGSConfig(**args, log_overlap=3, shuffle_dataset=False),
        train_dataset=samples,
        processing_class=tiny_processor(),
    )
    trainer.train()
    weights = {key: value.detach() for key, value in trainer.student.named_parameters()}
    torch.save({"weights": weights, "log": trainer.state.log_history}, folder / f"{name}-{rank}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for each in RUNS:
        run(each, Path(sys.argv[1]), dist.get_world_size(), dist.get_rank())
