#!/usr/bin/env bash
# ms-swift's GKD: gradient accumulation changes the loss and its gradient where responses have different lengths.
#
# ms-swift 4.6.0, rlhf_trainers/gkd_trainer.py, _compute_jsd_loss (divides by the tokens of the micro-batch), with
# transformers 5.19.0, TRL 0.29.1 and torch 2.14.1; 2026-11-29.
# Expected: two micro-batches of one row give the gradient of one batch of these two rows.
# What happens: each micro-batch's loss is its own mean over tokens, and the host averages these means: a token of a
#   short response counts more the smaller micro-batches are. No option changes it.
# Output seen: gradient norm of two micro-batches of one 0.872, of one of two 0.664
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.19.0 trl==0.29.1 \
        peft==0.20.0 datasets==4.8.4 accelerate modelscope cryptography msgspec qwen-vl-utils addict aiohttp dacite \
        einops fastapi json-repair nltk openai rouge sentencepiece simplejson sortedcontainers tiktoken uvicorn \
        zstandard tensorboard matplotlib binpacking
    "$folder/venv/bin/pip" install --quiet --no-deps ms-swift==4.6.0
    PYTHON="$folder/venv/bin/python"
fi
export USE_HF=1 HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
cat > "$folder/run.py" <<'PY'
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

folder, size = Path(sys.argv[1]), int(sys.argv[2])
words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>", *"system user assistant say a b c d e f g h".split()]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<unk>"
)
tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
for seed, name in enumerate(("student", "teacher")):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3, eos_token_id=2, pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
with open(folder / "rows.jsonl", "w") as file:
    for answer in ("a", "b c d e f g h a b c d e") * 2:
        messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]
        file.write(json.dumps({"messages": messages}) + "\n")

from swift.arguments import RLHFArguments
from swift.pipelines import rlhf_main
from swift.rlhf_trainers import GKDTrainer

log = GKDTrainer.log


def logged(self, logs, start_time=None):
    if "grad_norm" in logs:
        (folder / f"norm{size}").write_text(str(logs["grad_norm"]))
    log(self, logs, start_time)


GKDTrainer.log = logged
rlhf_main(
    RLHFArguments(
        rlhf_type="gkd", model=str(folder / "student"), teacher_model=str(folder / "teacher"), model_type="qwen3",
        teacher_model_type="qwen3", template="qwen3", dataset=[str(folder / "rows.jsonl")], tuner_type="full",
        torch_dtype="float32", attn_impl="sdpa", lmbda=0.0, max_steps=1, per_device_train_batch_size=size,
        gradient_accumulation_steps=2 // size, output_dir=str(folder / "out"), logging_steps=1, save_strategy="no",
        report_to=[], gradient_checkpointing=False, split_dataset_ratio=0, dataset_num_proc=1,
        dataloader_num_workers=0, dataset_shuffle=False, train_dataloader_shuffle=False, seed=0,
    )
)
PY
for size in 1 2; do
    "$PYTHON" "$folder/run.py" "$folder" "$size" > "$folder/log" 2>&1 || { tail -20 "$folder/log"; exit 1; }
done
"$PYTHON" - "$folder" <<'PY'
import sys
from pathlib import Path

split, whole = (float((Path(sys.argv[1]) / f"norm{size}").read_text()) for size in (1, 2))
print(f"gradient norm of two micro-batches of one {split:.3f}, of one of two {whole:.3f}")
assert abs(split - whole) > 0.01 * whole, "it has changed"
PY
