#!/usr/bin/env bash
# A model of transformers that was moved to float64 is right to float32 alone: its norms round what they are given.
#
# transformers 5.24.0, models/qwen3_vl/modeling_qwen3_vl.py, Qwen3VLTextRMSNorm.forward: the hidden states are cast to
# float32, normalised, and cast back, whatever dtype they have; most families' norms do so; 2026-11-29.
# Expected: in float64, hidden states and gradients are right to about 1e-15, as a reference for kernels has to be.
# What happens: each norm rounds to float32. Central differences of the loss do not agree with its gradient, and two
#   float64 runs whose inputs are arranged otherwise differ by about 1e-8.
# Output seen: relative error of one norm in float64: 7e-08
#   relative difference between the gradient and central differences (step 1e-06): 0.09
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import torch
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

torch.manual_seed(0)
norm = Qwen3VLTextRMSNorm(64, eps=1e-6).double()
x = torch.randn(8, 64, dtype=torch.float64)
exact = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
with torch.no_grad():
    found = norm(x)
assert found.dtype == torch.float64
error = ((found - exact).norm() / exact.norm()).item()
print(f"relative error of one norm in float64: {error:.0e}")

weights = torch.randn(64, dtype=torch.float64)


def loss(values):
    return (norm(values) * weights).sum()


x.requires_grad_()
(gradient,) = torch.autograd.grad(loss(x), x)
direction = torch.randn_like(x)
step = 1e-6
with torch.no_grad():
    slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
expected = (gradient * direction).sum()
difference = abs((slope - expected) / expected).item()
print(f"relative difference between the gradient and central differences (step {step:g}): {difference:.1g}")
assert error > 1e-9 and difference > 1e-5, "it has changed"
PY
