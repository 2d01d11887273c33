#!/usr/bin/env bash
# The first call of any operator made with torch.library.custom_op loads Dynamo, whether or not anything is compiled.
#
# torch 2.14.1, torch/_library/custom_ops.py, CustomOpDef.register_kernel wraps the implementation by
# torch._compile._disable_dynamo, which imports torch._dynamo with the first call; 2026-11-30.
# Expected: calling an operator in eager mode costs what its implementation costs, as with torch.library.Library.
# What happens: about 890 modules are imported (Dynamo, torch.distributed, sympy), a second of processor time. A fused
#   loss that is registered so pays it in its first call, and a benchmark without a warm-up counts it as the loss's.
# Output seen: Library: 0 modules, Dynamo loaded: False; custom_op: 893 modules, Dynamo loaded: True, 1.1 s of processor time
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 numpy
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import sys
import time

import torch
from torch import Tensor


def double(x: Tensor) -> Tensor:
    return 2 * x


library = torch.library.Library("example", "FRAGMENT")
library.define("low(Tensor x) -> Tensor")
library.impl("low", double, "CompositeExplicitAutograd")
high = torch.library.custom_op("example::high", double, mutates_args=())

x = torch.ones(3)


def first_call(operator):
    before, began = len(sys.modules), time.process_time()
    assert torch.equal(operator(x), 2 * x)
    return len(sys.modules) - before, "torch._dynamo" in sys.modules, time.process_time() - began


few, early, _ = first_call(torch.ops.example.low)
many, late, seconds = first_call(high)
print(
    f"Library: {few} modules, Dynamo loaded: {early}; "
    f"custom_op: {many} modules, Dynamo loaded: {late}, {seconds:.1f} s of processor time"
)
assert not early and few < 10, "it has changed"
assert late and many > 300, "it has changed"
PY
