#!/usr/bin/env bash
# Llama 4's wrapper fails.
#
# transformers 5.24.0, models/llama4/modeling_llama4.py, Llama4ForConditionalGeneration.forward; 2026-11-28.
# Expected: logits of a text prompt.
# What happens: the wrapper reads image_outputs of its text model's output, which has none.
# Output seen: AttributeError: 'MoeCausalLMOutputWithPast' object has no attribute 'image_outputs'
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import torch
import transformers

text = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 2, "pad_token_id": 0,
}
vision = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}
config = transformers.Llama4Config(text_config=text, vision_config=vision)
model = transformers.Llama4ForConditionalGeneration(config).eval()
try:
    model(input_ids=torch.tensor([[5, 6, 7]]))
except AttributeError as error:
    print(f"AttributeError: {error}")
    assert "image_outputs" in str(error), "it has changed"
else:
    raise SystemExit("it has changed: a text prompt has logits")
PY
