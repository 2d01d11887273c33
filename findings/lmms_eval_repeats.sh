#!/usr/bin/env bash
# lmms-eval's --repeats asks a question several times and scores the first response alone.
#
# lmms-eval 0.7.3, lmms_eval/evaluator.py, _process_document_results: the scores of each repetition are taken where a
# question has as many requests as repeats, but a generate_until task has one request with all responses in it, of which
# the default filter takes the first; 2026-11-29. A reviewer said so before the feature was merged (pull request 1001).
# Expected: with repeats=3 and one right response of three, an expected accuracy of 1/3, as the help of --repeats has it
#   ("computes EA, CA, IV, CR metrics").
# What happens: all three are generated; the accuracy is that of the first, and no such metric is reported, without a
#   word.
# Output seen: asked 3 times; results: {'exact_match,none': np.float64(1.0)}
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 lmms-eval==0.7.3 filelock==3.32.7
    PYTHON="$folder/venv/bin/python"
fi
echo '{"question": "1 + 1?", "answer": "2"}' > "$folder/rows.jsonl"
cat > "$folder/task.yaml" <<'YAML'
task: one_question
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 8, temperature: 1.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
YAML
HF_HOME="$folder" HF_HUB_OFFLINE=1 "$PYTHON" - "$folder" <<'PY' 2> "$folder/log" || { tail "$folder/log"; exit 1; }
import sys

from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager


class RightOnce(lmms):
    def generate_until(self, requests):
        self.asked = len(requests)
        return ["2", "3", "4"][: len(requests)]

    def loglikelihood(self, requests):
        raise NotImplementedError

    generate_until_multi_round = loglikelihood


model = RightOnce()
manager = TaskManager(include_path=sys.argv[1])
found = simple_evaluate(model=model, tasks=["one_question"], task_manager=manager, repeats=3, bootstrap_iters=0)
numbers = found["results"]["one_question"]
shown = {name: value for name, value in numbers.items() if "," in name and "_stderr" not in name}
print(f"asked {model.asked} times; results: {shown}")
assert model.asked == 3 and shown == {"exact_match,none": 1.0}, "it has changed"
PY
