#!/usr/bin/env bash
# lmms-eval's task vlmsareblind marks right answers wrong when they are sentences.
#
# lmms-eval 0.7.3, lmms_eval/tasks/vlmsareblind/utils.py, parse_response; 2026-11-29.
# Expected: an answer in the form that the dataset's prompt asks for, {2} or {o}, counts wherever it stands in the
#   response, and "Yes." is yes.
# What happens: the braces are optional in the pattern and the first match counts: the first number of the sentence, or
#   its first letter. "Yes." is no answer at all, for it is compared as a whole. All three responses score 0.
# Output seen: accuracy 0.0, 0.0 and 0.0
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --no-deps lmms-eval==0.7.3
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import importlib.util
import pathlib

package = pathlib.Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("blind", package / "tasks" / "vlmsareblind" / "utils.py")
blind = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blind)

rows = [
    ("Line Plot Intersections", "1", "The 2 lines cross in {1} point."),
    ("Circled Letter", "o", "The circled letter is {o}."),
    ("Touching Circles", "Yes", "Yes."),
]
scores = [
    blind.vlmsareblind_process_results({"task": task, "groundtruth": gold}, [response])["accuracy"]
    for task, gold, response in rows
]
print("accuracy", ", ".join(map(str, scores[:-1])), "and", scores[-1])
assert scores == [0.0, 0.0, 0.0], "it has changed"
PY
