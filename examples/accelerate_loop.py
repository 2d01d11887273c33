"""VGS in a loop on accelerate, on one GPU or on many: DDP or FSDP2, as the launcher's config says.

accelerate launch --config_file configs/accelerate/ddp.yaml --num_processes 2 examples/accelerate_loop.py
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import DataSource, load_samples, respond, vgs_step

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="Qwen/Qwen3-VL-2B-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen3-VL-8B-Instruct")
parser.add_argument("--data", default="questions.jsonl", help="what is read: docs/data.md")
parser.add_argument("--out", default="runs/accelerate_loop")
parser.add_argument("--epochs", type=int, default=1)
parser.add_argument("--batch_size", type=int, default=4, help="questions of a process in a micro-batch")
parser.add_argument("--accumulate", type=int, default=1, help="micro-batches in a step")
parser.add_argument("--learning_rate", type=float, default=1e-6)
parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer")
options = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=options.accumulate)
student = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32)
teacher = AutoModelForImageTextToText.from_pretrained(options.teacher).to(accelerator.device).eval()
processor = AutoProcessor.from_pretrained(options.student)
# All micro-batches of all processes have equally many samples, so that the mean of their means is the mean of all.
samples = load_samples(DataSource(options.data))
loader = DataLoader(samples, options.batch_size, shuffle=True, collate_fn=list, drop_last=True)
optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
set_seed(0, device_specific=True)  # each process samples answers of its own

for _ in range(options.epochs):
    for batch in loader:
        with accelerator.accumulate(student):
            responses = respond(student, processor, batch, max_new_tokens=options.max_new_tokens)
            output = vgs_step(student, teacher, processor, batch, responses, "vgs")
            accelerator.backward(output.loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print({name: round(value.item(), 4) for name, value in output.metrics().items()})

weights = accelerator.get_state_dict(student)
if accelerator.is_main_process:
    accelerator.unwrap_model(student).save_pretrained(options.out, state_dict=weights)
    processor.save_pretrained(options.out)
accelerator.end_training()
