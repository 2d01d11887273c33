#!/usr/bin/env bash
# A trainer of TRL replaces a README.md that a person has edited, with every checkpoint.
#
# trl 1.16.0, trainer/base_trainer.py, create_model_card, called by every _save_checkpoint; 2026-11-29.
# Expected: a card that is there stays, as PEFT keeps it, or a message says that it is replaced.
# What happens: without a word it is replaced, for a model from a folder by one that links to a model "None".
# Output seen: kept False, says fine-tuned version of [None](https://huggingface.co/None)
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0 trl==1.16.0 datasets==5.2.0 accelerate==1.15.0
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import tempfile
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

folder = Path(tempfile.mkdtemp())
backend = Tokenizer(models.WordLevel({"<unk>": 0, "<end>": 1, "red": 2}, unk_token="<unk>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
config = LlamaConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(config).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")

card = folder / "out" / "README.md"
card.parent.mkdir()
card.write_text("---\nlicense: apache-2.0\n---\n\n# Mine\n\nTrained on pictures of my garden.\n")
args = SFTConfig(output_dir=str(card.parent), max_steps=1, save_steps=1, use_cpu=True, bf16=False, report_to="none")
data = Dataset.from_dict({"text": ["red red red"] * 8})
SFTTrainer(model=str(folder / "model"), args=args, train_dataset=data, processing_class=tokenizer).train()

text = card.read_text()
(link,) = [line for line in text.splitlines() if "fine-tuned version" in line]
kept, says = "my garden" in text, link[link.index("fine") :].rstrip(".")
print(f"kept {kept}, says {says}")
assert not kept and says.endswith("[None](https://huggingface.co/None)"), "it has changed"
PY
