#!/usr/bin/env bash
# lmms-eval 0.7.3 cannot evaluate anything with filelock 4, which pip installs beside it.
#
# lmms-eval 0.7.3, lmms_eval/evaluator.py, _enable_reentrant_filelocks: it imports filelock._api, a private module that
# filelock 4 does not have, before any dataset is read; no requirement says so. filelock 4.3.1; 2026-11-29.
# Expected: `pip install lmms-eval==0.7.3` gives a package that evaluates.
# What happens: every evaluation stops there; on the command line it is logged, and the exit status is 0. With filelock
#   3.32.7 it runs.
# Output seen: ModuleNotFoundError: No module named 'filelock._api'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 lmms-eval==0.7.3
    PYTHON="$folder/venv/bin/python"
fi
"$PYTHON" -m pip install --quiet --no-deps --target "$folder/first" filelock==4.3.1 2> /dev/null
PYTHONPATH="$folder/first" HF_HOME="$folder" "$PYTHON" - <<'PY' 2> "$folder/log" || { tail "$folder/log"; exit 1; }
import lmms_eval.evaluator

try:
    lmms_eval.evaluator._enable_reentrant_filelocks()  # simple_evaluate calls it before it loads the datasets
except ImportError as error:
    print(f"{type(error).__name__}: {error}")
else:
    raise SystemExit("it has changed")
PY
