"""VGS for a student patched by Liger: its norms, MLPs and rotary embeddings run as Triton kernels, on a GPU.

python examples/liger.py --student Qwen/Qwen3.5-2B --teacher Qwen/Qwen3.5-9B --data questions.jsonl
"""

import argparse

import torch
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from vgs import DataSource, load_samples, respond, vgs_step

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="Qwen/Qwen3.5-2B")
parser.add_argument("--teacher", default="Qwen/Qwen3.5-9B")
parser.add_argument("--data", default="questions.jsonl", help="what is read: docs/data.md")
parser.add_argument("--out", default="runs/liger")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=8, help="questions in a step")
parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
# Before models are loaded: classes are patched, the teacher's too where it is of this family. Liger's loss is not used.
MODEL_TYPE_TO_APPLY_LIGER_FN[AutoConfig.from_pretrained(options.student).model_type](fused_linear_cross_entropy=False)
student = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32).to(device)
teacher = AutoModelForImageTextToText.from_pretrained(options.teacher).to(device).eval()
processor = AutoProcessor.from_pretrained(options.student)
loader = DataLoader(load_samples(DataSource(options.data)), options.batch_size, shuffle=True, collate_fn=list)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0)

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
