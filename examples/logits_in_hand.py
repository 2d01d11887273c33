"""VGS from logits that a trainer has formed already: vgs_loss (divergence_loss for plain distillation).

python examples/logits_in_hand.py --data questions.jsonl
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import DataSource, load_samples, respond, token_weights
from vgs.data.prompts import encode_prompts
from vgs_kernels import VGSObjective, vgs_loss

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--student", default="Qwen/Qwen3-VL-2B-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen3-VL-8B-Instruct")
parser.add_argument("--data", default="questions.jsonl", help="what is read: docs/data.md")
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--batch_size", type=int, default=4)
parser.add_argument("--max_new_tokens", type=int, default=128, help="longest answer")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
student = AutoModelForImageTextToText.from_pretrained(options.student, dtype=torch.float32).to(device)
teacher = AutoModelForImageTextToText.from_pretrained(options.teacher, dtype=torch.float32).to(device).eval()
processor = AutoProcessor.from_pretrained(options.student)
loader = DataLoader(load_samples(DataSource(options.data)), options.batch_size, shuffle=True, collate_fn=list)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0)


def answer_logits(model: nn.Module, samples: list[dict], answers: list[Tensor]) -> Tensor:
    """[N, V] at the N tokens of all answers: prompts padded on the left, answers on the right."""
    ids, mask, fields = encode_prompts(processor, samples)
    ids = torch.cat([ids, pad_sequence(answers, batch_first=True)], dim=1)
    real = pad_sequence([torch.ones_like(x) for x in answers], batch_first=True)
    new = (0, real.shape[1])  # an answer's tokens are text
    fields = {name: nn.functional.pad(x, new) if "token_type_ids" in name else x for name, x in fields.items()}
    batch = {"input_ids": ids, "attention_mask": torch.cat([mask, real], dim=1), **fields}
    logits = model(**{name: x.to(device) for name, x in batch.items()}, use_cache=False).logits
    return logits[:, -real.shape[1] - 1 : -1][real.bool().to(device)]


for _, samples in zip(range(options.steps), loader, strict=False):
    answers = [torch.tensor(x) for (x,) in respond(student, processor, samples, max_new_tokens=options.max_new_tokens)]
    views = [samples, [{**sample, "images": []} for sample in samples]]  # with the images, and without
    rows = [answer_logits(student, view, answers) for view in views]
    with torch.no_grad():
        rows += [answer_logits(teacher, view, answers) for view in views]
    weights = torch.cat(token_weights([len(x) for x in answers], "trajectory")).to(device)
    output = vgs_loss(*rows, objective=VGSObjective(), token_weights=weights)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print({name: round(value.item(), 4) for name, value in output.metrics().items()})
