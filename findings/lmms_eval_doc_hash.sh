#!/usr/bin/env bash
# lmms-eval's doc_hash and task_hashes do not depend on the questions.
#
# lmms-eval 0.7.3, lmms_eval/evaluator.py, _process_document_results: doc_hash is taken of requests[0].doc, which
# construct_requests never sets, so it is the hash of "null"; task_hashes is made of it; 2026-11-29.
# Expected: the hash of a row in the samples that --log_samples writes tells rows, and versions of a dataset, apart.
# What happens: it is the same for every row of every generate_until task, so that two evaluations on different data look
#   alike.
# Output seen: 2 questions, hashes: {'74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b'}, sha256 of null
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 lmms-eval==0.7.3 filelock==3.32.7
    PYTHON="$folder/venv/bin/python"
fi
printf '%s\n' '{"question": "1 + 1?", "answer": "2"}' '{"question": "Who wrote it?", "answer": "Ann"}' > "$folder/rows.jsonl"
cat > "$folder/task.yaml" <<'YAML'
task: two_questions
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_new_tokens: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
YAML
HF_HOME="$folder" HF_HUB_OFFLINE=1 "$PYTHON" - "$folder" <<'PY' 2> "$folder/log" || { tail "$folder/log"; exit 1; }
import hashlib
import sys

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

manager = TaskManager(include_path=sys.argv[1])
found = simple_evaluate(
    model="dummy", tasks=["two_questions"], task_manager=manager, log_samples=True, bootstrap_iters=0
)
samples = found["samples"]["two_questions"]
hashes = {sample["doc_hash"] for sample in samples}
print(f"{len(samples)} questions, hashes: {hashes}, sha256 of null")
assert hashes == {hashlib.sha256(b"null").hexdigest()}, "it has changed"
PY
