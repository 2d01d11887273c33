#!/usr/bin/env bash
# verl's patch of Qwen3-VL changes what the model says of a picture: it makes no rotary positions of images.
#
# verl 0.9.1, models/transformers/qwen3_vl.py, qwen3_vl_base_forward, which monkey_patch.py puts on the class
# Qwen3VLModel; with transformers 5.9.0, its own pin, and torch 2.14.1; 2026-11-29.
# Expected: apply_monkey_patch(model) leaves model(**inputs) as it was, up to rounding.
# What happens: where the caller sends no position_ids, the patched forward sends none on, and the text model counts
#   tokens in a row; the library's forward makes positions of rows and columns of the picture. The patch is on the class:
#   a second model in the same process, such as a teacher, is changed too. No error, no warning.
# Output seen: logits differ by 0.64 of the largest with a picture, by 0.00 without
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.9.0 tensordict==0.10.0 \
        ray==2.50.1 hydra-core==1.3.8 codetiming dill pylatexenc torchdata accelerate datasets peft pandas requests
    "$folder/bin/pip" install --quiet --no-deps verl==0.9.1
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY' 2>/dev/null
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from verl.models.transformers.monkey_patch import apply_monkey_patch

text = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}
vision = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0], "initializer_range": 0.2,
}
torch.manual_seed(0)
model = Qwen3VLForConditionalGeneration(
    Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=60, video_token_id=61, vision_start_token_id=62,
        vision_end_token_id=63,
    )
).eval()
ids = torch.tensor([[5, 62, *[60] * 16, 63, 6, 7, 8]])
picture = {
    "input_ids": ids,
    "attention_mask": torch.ones_like(ids),
    "mm_token_type_ids": (ids == 60).long(),
    "pixel_values": torch.randn(64, 3 * 2 * 8 * 8),
    "image_grid_thw": torch.tensor([[1, 8, 8]]),
}
words = {"input_ids": ids[:, -3:], "attention_mask": torch.ones_like(ids[:, -3:])}


def logits():
    with torch.no_grad():
        return [model(**inputs).logits for inputs in (picture, words)]


before = logits()
apply_monkey_patch(model, use_remove_padding=False, ulysses_sp_size=1, use_fused_kernels=False)
gaps = [((x - y).abs().max() / y.abs().max()).item() for x, y in zip(logits(), before)]
print(f"logits differ by {gaps[0]:.2f} of the largest with a picture, by {gaps[1]:.2f} without")
assert gaps[0] > 0.01 > gaps[1], "it has changed"
PY
