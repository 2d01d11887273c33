#!/usr/bin/env bash
# Processors of Gemma 4, AyaVision and Cohere2Vision pad prompts that nobody asked them to pad.
#
# transformers 5.24.0, models/{gemma4,aya_vision,cohere2_vision}/processing_*.py, "padding": True among the defaults of
# the text; 2026-11-28.
# Expected: two prompts without any argument for padding or tensors give two lists of their own lengths, as other
#   processors and all tokenizers give them.
# What happens: the shorter one is filled up with pad tokens. Who takes the lists for prompts gets pad tokens in them
#   (the attention mask tells them apart).
# Output seen: alone 1 and 4 tokens, together 4 and 4; [0, 0, 0, 7]
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import importlib
import inspect

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

def words(*specials):
    """A tokenizer of whole words, whose special tokens are these."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *specials, "red", "blue", "?"]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(specials))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


names = ["<|image|>", "<|IMG_PATCH|>", "<image_tokens>"]
tokenizer = words(*names)
tokenizer.padding_side = "left"
for name, token in zip(("image_token", "boi_token", "eoi_token"), names, strict=True):
    setattr(tokenizer, name, token)
    setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
processor = transformers.AyaVisionProcessor(
    transformers.GotOcr2ImageProcessor(size={"height": 32, "width": 32}), tokenizer, patch_size=8, img_size=32
)
texts = ["red", "red blue red ?"]
alone = [len(processor(text=[text])["input_ids"][0]) for text in texts]
together = processor(text=texts)["input_ids"]
print(f"alone {alone[0]} and {alone[1]} tokens, together {len(together[0])} and {len(together[1])}; {together[0]}")
assert [len(ids) for ids in together] != alone, "it has changed"
for family in ("gemma4", "cohere2_vision"):
    module = importlib.import_module(f"transformers.models.{family}.processing_{family}")
    assert '"padding": True' in inspect.getsource(module), "it has changed"
PY
