#!/usr/bin/env bash
# Trainer resumes Qwen2.5-VL from a checkpoint, and goes on from the initial weights.
#
# transformers 5.24.0, trainer.py, Trainer._load_from_checkpoint (state dict loaded as it stands, not strictly);
# 2026-11-28.
# Expected: train(resume_from_checkpoint=...) begins with the weights in the checkpoint.
# What happens: the checkpoint has the names of the published files (model.layers...), the modules have others
#   (model.language_model.layers...), and only from_pretrained renames. So the model keeps the weights that
#   the new process began with, while step, optimizer and random numbers are those of the checkpoint. A warning lists
#   missing and unexpected keys; there is no error.
# Output seen: trained embedding: changed by the first run True, there again after resuming False
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 accelerate==1.15.0 pillow
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import tempfile
import warnings

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

warnings.simplefilter("ignore")
text = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}
vision = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
    "fullatt_block_indexes": [0],
}
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61)
rows = [{"input_ids": torch.arange(5, 13), "labels": torch.arange(5, 13)} for _ in range(4)]
kept = {}


class Look(TrainerCallback):
    def on_train_begin(self, *_, model, **__):
        kept["begin"] = model.get_input_embeddings().weight.detach().clone()


def run(folder, steps, **resume):
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    arguments = TrainingArguments(
        folder, max_steps=steps, save_steps=1, learning_rate=0.1, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, logging_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[Look()]).train(**resume)
    return model.get_input_embeddings().weight.detach().clone()


with tempfile.TemporaryDirectory() as folder:
    trained = run(folder, 1)
    initial = kept["begin"]
    run(folder, 2, resume_from_checkpoint=f"{folder}/checkpoint-1")
    changed, there = not torch.equal(trained, initial), torch.equal(kept["begin"], trained)
print(f"trained embedding: changed by the first run {changed}, there again after resuming {there}")
assert changed and not there and torch.equal(kept["begin"], initial), "it has changed"
PY
