#!/usr/bin/env bash
# AyaVision (and Cohere2Vision) leave out the factor of their text model's logits.
#
# transformers 5.24.0, models/aya_vision/modeling_aya_vision.py, AyaVisionForConditionalGeneration.forward;
# 2026-11-28.
# Expected: a text prompt gives the logits of the text model inside, Cohere2ForCausalLM, whose config says
#   logit_scale=0.25: both have the same weights.
# What happens: the wrapper does not multiply by it; its logits are four times as large, so that sampling at
#   temperature 1 is sampling of the text model at temperature 0.25.
# Output seen: wrapper / text model = 4.0000
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

text = transformers.Cohere2Config(
    vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
vision = transformers.SiglipVisionConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
torch.manual_seed(0)
wrapper = transformers.AyaVisionForConditionalGeneration(
    transformers.AyaVisionConfig(text_config=text, vision_config=vision, image_token_id=39)
).eval()
alone = transformers.Cohere2ForCausalLM(text).eval()
alone.model.load_state_dict(wrapper.model.language_model.state_dict())
alone.lm_head.load_state_dict(wrapper.lm_head.state_dict())
ids = torch.tensor([[5, 6, 7, 8]])
with torch.no_grad():
    logits, expected = wrapper(input_ids=ids).logits, alone(input_ids=ids).logits
print(f"wrapper / text model = {logits.norm() / expected.norm():.4f}")
assert torch.allclose(logits, 4 * expected, rtol=1e-4, atol=1e-6), "it has changed"
PY
