"""How far each part of the objective turns the gradient of one step, of a text model with documents as evidence.

python examples/parts.py --student runs/documents/student --teacher runs/documents/teacher --data held_out.jsonl
"""

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vgs import DataSource, load_samples, respond, vgs_step
from vgs_kernels import VGSObjective

#: What is set otherwise than in "vgs"; angles are taken to the first two.
SETTINGS = {
    "plain": {"gamma": 0.0, "lam": 0.0},
    "vgs": {},
    "lam 0": {"lam": 0.0},
    "lam 1": {"lam": 1.0},
    "lam 1, quantile of each answer": {"lam": 1.0, "vds_scope": "trajectory"},
    "lam 1, every token": {"lam": 1.0, "vds_quantile": 0.0},
    "prior with gradient": {"detach_prior": False},
    "adaptive": {"schedule": "adaptive"},
}
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="runs/documents/student")
parser.add_argument("--teacher", default="runs/documents/teacher")
parser.add_argument("--data", default="held_out.jsonl", help="questions; the evidence is in its column 'document'")
parser.add_argument("--batches", type=int, default=6, help="of as many questions as a step")
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--max_new_tokens", type=int, default=24, help="longest answer")
parser.add_argument("--out", default="runs/documents/parts.jsonl", help="a line for each batch; those there are kept")
options = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(options.student)
student, teacher = (AutoModelForCausalLM.from_pretrained(x).eval() for x in (options.student, options.teacher))
student.get_input_embeddings().requires_grad_(False)
samples = load_samples(DataSource(options.data, evidence_column="document", answer=None))
Path(options.out).touch()
for number in range(len(Path(options.out).read_text().splitlines()), options.batches):
    torch.manual_seed(number)
    batch = [samples[number * options.batch_size + i] for i in range(options.batch_size)]
    responses = respond(student, tokenizer, batch, max_new_tokens=options.max_new_tokens)
    kept, line = {}, {}
    for name, changes in SETTINGS.items():
        student.zero_grad()
        vgs_step(student, teacher, tokenizer, batch, responses, VGSObjective(**changes)).loss.backward()
        gradient = [x.grad for x in student.parameters() if x.grad is not None]
        kept |= {name: gradient} if len(kept) < 2 else {}
        norm = torch.stack([x.norm() for x in gradient]).norm().item()
        line[name] = {"norm": norm}
        for other, theirs in kept.items():
            product = sum(torch.vdot(x.flatten(), y.flatten()).item() for x, y in zip(gradient, theirs, strict=True))
            line[name][f"to {other}"] = math.degrees(math.acos(min(1.0, product / norm / line[other]["norm"])))
    with open(options.out, "a") as file:
        print(json.dumps(line), file=file)
