"""What a model's own answers take from the picture: per-token terms as a metric, without teacher and training.

python examples/metrics.py --model Qwen/Qwen3-VL-2B-Instruct --data questions.jsonl
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vgs import DataSource, describe_responses, load_samples, respond

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="Qwen/Qwen3-VL-2B-Instruct")
parser.add_argument("--data", default="questions.jsonl", help="what is read: docs/data.md")
parser.add_argument("--samples", type=int, default=64, help="ask the first so many questions")
parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(options.model).to(device).eval()
processor = AutoProcessor.from_pretrained(options.model)
samples = load_samples(DataSource(options.data, limit=options.samples))

means = []
for sample in samples:
    responses = respond(model, processor, [sample], max_new_tokens=options.max_new_tokens, greedy=True)
    ((terms,),) = describe_responses(model, processor, [sample], responses)
    top = terms["vds"].topk(min(3, len(terms["vds"]))).indices
    words = [processor.tokenizer.decode(terms["token_ids"][i]) for i in top]
    means.append(torch.stack([terms[name].mean() for name in ("vds", "entropy", "logps")]))
    print(f"vds {means[-1][0]:.3f}, most at {words}")

vds, entropy, logps = torch.stack(means).mean(0).tolist()
print(
    f"mean of {len(means)} answers, nats per token: vds {vds:.4f}, entropy {entropy:.4f}, log-probability {logps:.4f}"
)
