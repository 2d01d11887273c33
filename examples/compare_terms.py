"""What training has changed, by how much a token depends on the evidence: several students on the first one's answers.

python examples/compare_terms.py --students runs/documents/student runs/documents/plain runs/documents/vgs
"""

import argparse
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vgs import DataSource, load_samples, respond, score_responses
from vgs_kernels import VGSObjective

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--students", nargs="+", required=True, help="text models; the first gives the answers")
parser.add_argument("--teacher", default="runs/documents/teacher")
parser.add_argument("--data", default="held_out.jsonl", help="questions; the evidence is in its column 'document'")
parser.add_argument("--samples", type=int, default=24, help="ask the first so many questions")
parser.add_argument("--max_new_tokens", type=int, default=24, help="longest answer")
parser.add_argument("--bins", type=int, default=5, help="of equally many tokens, by the teacher's dependency")
parser.add_argument("--out", default="runs/documents/terms.json")
options = parser.parse_args()

torch.manual_seed(0)
tokenizer, load = AutoTokenizer.from_pretrained(options.students[0]), AutoModelForCausalLM.from_pretrained
teacher, responses, found = load(options.teacher).eval(), None, {}
samples = load_samples(DataSource(options.data, evidence_column="document", answer=None, limit=options.samples))
for path in options.students:
    student = load(path).eval()
    responses = responses or respond(student, tokenizer, samples, max_new_tokens=options.max_new_tokens)
    pairs = zip(samples, responses, strict=True)
    rows = [score_responses(student, teacher, tokenizer, [x], answers, VGSObjective())[0] for x, answers in pairs]
    found[Path(path).name] = {term: torch.cat([row[term] for row in rows]).numpy() for term in rows[0]}

# Questions, and not tokens, are drawn with replacement: tokens of one answer are not independent.
question = np.repeat(np.arange(len(rows)), [len(row["vds"]) for row in rows])
parts = [*np.array_split(torch.cat([row["vds"] for row in rows]).argsort(), options.bins), np.arange(len(question))]
draws = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=4000)


def interval(values):
    """[mean, low, high] of each bin and, at last, of all tokens: 95 %, by bootstrap over questions."""
    sums = [[np.bincount(question[p], x[p], len(rows)) for x in (values, np.ones(len(values)))] for p in parts]
    return [[x.sum() / n.sum(), *np.nanquantile((draws @ x) / (draws @ n), [0.025, 0.975])] for x, n in sums]


terms = ["standard", "visual", "language", "student_vds", "vds"]
report = {name: {term: interval(x[term]) for term in terms} for name, x in found.items()}
for a, b in combinations(found, 2):
    report[f"{b} - {a}"] = {term: interval(found[b][term] - found[a][term]) for term in terms[:3]}
sizes = {"questions": len(rows), "tokens": len(question)}
Path(options.out).write_text(json.dumps({**sizes, "nats": report}, default=float))
for name, values in report.items():
    for term, bins in values.items():
        print(f"{name:24}{term:12}", "  ".join("{:+.3f} ({:+.3f} {:+.3f})".format(*x) for x in bins))
