"""VGS for a student with LoRA: a small addition to its weights learns, they themselves stay as they are.

python examples/lora.py --data questions.jsonl
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import DataSource, load_samples, respond, vgs_step

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="Qwen/Qwen3-VL-2B-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen3-VL-8B-Instruct")
parser.add_argument("--data", default="questions.jsonl", help="what is read: docs/data.md")
parser.add_argument("--out", default="runs/lora")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=8, help="questions in a step")
parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
student = AutoModelForImageTextToText.from_pretrained(options.student).to(device)
teacher = AutoModelForImageTextToText.from_pretrained(options.teacher).to(device).eval()
processor = AutoProcessor.from_pretrained(options.student)
# The text model alone: "all-linear" would put half of the addition into the vision tower. PEFT keeps it in float32.
names = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
student = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules=names))
student.print_trainable_parameters()
optimizer = torch.optim.AdamW([x for x in student.parameters() if x.requires_grad], lr=1e-5, weight_decay=0.0)
loader = DataLoader(load_samples(DataSource(options.data)), options.batch_size, shuffle=True, collate_fn=list)

step = 0
while step < options.steps:
    for batch in loader:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            responses = respond(student, processor, batch, max_new_tokens=options.max_new_tokens)
            output = vgs_step(student, teacher, processor, batch, responses, "vgs")
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(step, {name: round(value.item(), 4) for name, value in output.metrics().items()})
        if step == options.steps:
            break

student.save_pretrained(options.out)  # the addition alone
