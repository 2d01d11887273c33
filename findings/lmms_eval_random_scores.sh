#!/usr/bin/env bash
# lmms-eval's task VisualPuzzles scores a response without an answer by a throw of the dice.
#
# lmms-eval 0.7.3, lmms_eval/tasks/VisualPuzzles/utils.py, parse_response: its last line is random.choice(all_choices);
# 2026-11-29.
# Expected: an empty response, or one that was cut off, is wrong.
# What happens: it is right once in four. A model that never ends its reasoning scores 25 %, and the score of one that
#   does depends on how many random numbers were drawn before.
# Output seen: an empty response is right 2500 times in 10000
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet --no-deps lmms-eval==0.7.3
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import contextlib
import importlib.util
import io
import pathlib
import random

package = pathlib.Path(importlib.util.find_spec("lmms_eval").submodule_search_locations[0])
spec = importlib.util.spec_from_file_location("puzzles", package / "tasks" / "VisualPuzzles" / "utils.py")
puzzles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(puzzles)

random.seed(0)
with contextlib.redirect_stdout(io.StringIO()):  # it prints every response
    scores = [puzzles.VisualPuzzles_process_result({"options": None, "answer": "A"}, [""]) for _ in range(10000)]
right = sum(score["exact_match"] for score in scores)
print(f"an empty response is right {right:.0f} times in 10000")
assert 2000 < right < 3000, "it has changed"
PY
