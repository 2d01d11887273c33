#!/usr/bin/env bash
# A tokenizer forgets additional_special_tokens when extra_special_tokens are given too.
#
# transformers 5.24.0, tokenization_utils_base.py, PreTrainedTokenizerBase.__init__; 2026-11-28.
# Expected: both are special tokens, or an error says that only one of the two is taken.
# What happens: without a word the first are lost: they are cut into pieces, or are unknown.
# Output seen: alone ['<turn>', 'red'], with extra_special_tokens ['<unk>', 'red']
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


def tokens(**options):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **options)
    return tokenizer.convert_ids_to_tokens(tokenizer("<turn> red")["input_ids"])


alone = tokens(additional_special_tokens=["<turn>"])
both = tokens(additional_special_tokens=["<turn>"], extra_special_tokens={"image_token": "<image>"})
print(f"alone {alone}, with extra_special_tokens {both}")
assert alone == ["<turn>", "red"] and both != alone, "it has changed"
PY
