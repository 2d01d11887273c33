"""VGS in a bare PyTorch loop: answer, score, step.

python examples/bare_loop.py --data questions.jsonl
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import DataSource, load_samples, respond, vgs_step

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="Qwen/Qwen3-VL-2B-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen3-VL-8B-Instruct")
parser.add_argument("--data", default="questions.jsonl", help="what is read: docs/data.md")
parser.add_argument("--out", default="runs/bare_loop")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=8, help="questions in a step")
parser.add_argument("--learning_rate", type=float, default=1e-6)
parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
# Steps of 1e-6 would be lost in bfloat16 weights: those of the student are float32, in mixed precision.
student = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32).to(device)
teacher = AutoModelForImageTextToText.from_pretrained(options.teacher).to(device).eval()
processor = AutoProcessor.from_pretrained(options.student)
samples = load_samples(DataSource(options.data))
loader = DataLoader(samples, options.batch_size, shuffle=True, collate_fn=list)
optimizer = torch.optim.AdamW(student.parameters(), lr=options.learning_rate, weight_decay=0.0)

step = 0
while step < options.steps:
    for batch in loader:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            responses = respond(student, processor, batch, max_new_tokens=options.max_new_tokens)
            output = vgs_step(student, teacher, processor, batch, responses, "vgs")
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(step, {name: round(value.item(), 4) for name, value in output.metrics().items()})
        if step == options.steps:
            break

student.save_pretrained(options.out)
processor.save_pretrained(options.out)
