"""A teacher and a weaker student, both of one text model: the student's words stay, what it reads far back suffers.

python examples/weaken.py --model google/gemma-3-270m --window 48
"""

import argparse

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="google/gemma-3-270m", help="a text model with sliding attention in some layers")
parser.add_argument("--student", default="runs/documents/student", help="folder to write")
parser.add_argument("--teacher", default="runs/documents/teacher", help="another")
parser.add_argument("--window", type=int, default=48, help="tokens that the student's sliding attention looks back")
parser.add_argument("--noise", type=float, default=0.04, help="on the student's matrices, in their standard deviations")
parser.add_argument("--seed", type=int, default=0, help="of the noise")
options = parser.parse_args()

config = AutoConfig.from_pretrained(options.model)
if getattr(config, "sliding_window", None) is None:
    parser.error(f"--model must have sliding attention (sliding_window in its config), got {options.model}.")
tokenizer = AutoTokenizer.from_pretrained(options.model)
if tokenizer.chat_template is None:  # of a model that was not trained on conversations
    begin, content = "{{ bos_token }}", "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.chat_template = f"{begin}{content}\nAnswer:"
model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
model.save_pretrained(options.teacher)

model.config.sliding_window = options.window
generator = torch.Generator().manual_seed(options.seed)
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * parameter.std() * options.noise)
model.save_pretrained(options.student)
for folder in (options.student, options.teacher):
    tokenizer.save_pretrained(folder)
