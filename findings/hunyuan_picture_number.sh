#!/usr/bin/env bash
# In HunYuan-VL a sequence's states depend on how many pictures stand in the batch before it.
#
# transformers 5.24.0, models/hunyuan_vl/modeling_hunyuan_vl.py, HunYuanVLModel.get_rope_index: image_index is set to 0
# before the loop over the batch and counts on from row to row; 2026-11-29.
# Expected: pictures are numbered within their own sequence: two equal rows of a batch have equal positions and states.
# What happens: the picture of the second row has number 1, that of the eighth 7; no error. Trained or scored in a
#   batch, a sequence is another one than alone.
# Output seen: numbers of the pictures in 4 equal rows: [0, 1, 2, 3]
#   largest difference of the rows' states from the first row's: [0.0, 0.011, 0.023, 0.035], alone: 0.0
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
from transformers import HunYuanVLConfig, HunYuanVLForConditionalGeneration

torch.manual_seed(0)
text = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 4, 4, 4]},
}
vision = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "out_hidden_size": 64, "text_hidden_size": 64, "patch_size": 4, "spatial_merge_size": 2,
    "max_image_size": 64,
}
config = HunYuanVLConfig(
    text_config=text, vision_config=vision, image_token_id=4, im_start_id=5, im_end_id=6, im_newline_id=7
)
model = HunYuanVLForConditionalGeneration(config).eval()
for parameter in model.parameters():
    if parameter.ndim > 1:
        torch.nn.init.normal_(parameter, std=0.3)

grid = torch.tensor([[1, 4, 4]])  # two by two merged patches: two rows of two tokens and a separator, and two ends
row = [10, 11, *[4] * 8, 12, 13, 14]
pixels = torch.randn(16, 3 * 4 * 4)


@torch.no_grad()
def run(count):
    ids = torch.tensor([row] * count)
    kinds = (ids == 4).long()
    positions = model.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid.repeat(count, 1))[0]
    states = model.model(
        input_ids=ids, mm_token_type_ids=kinds, pixel_values=pixels.repeat(count, 1),
        image_grid_thw=grid.repeat(count, 1), attention_mask=torch.ones_like(ids),
    ).last_hidden_state
    return positions[3, :, 4].tolist(), states


numbers, states = run(4)
alone = run(1)[1]
gaps = [round((x - states[0]).abs().max().item(), 3) for x in states]
print(f"numbers of the pictures in 4 equal rows: {numbers}")
print(f"largest difference of the rows' states from the first row's: {gaps},", end=" ")
print(f"alone: {round((alone[0] - states[0]).abs().max().item(), 3)}")
assert (alone[0] - states[0]).abs().max() < 1e-4
assert numbers == [0, 1, 2, 3] and all(gap > 1e-3 for gap in gaps[1:]), "it has changed"
PY
