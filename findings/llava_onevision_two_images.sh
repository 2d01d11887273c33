#!/usr/bin/env bash
# LlavaOnevisionProcessor counts each picture of a prompt with several as if it were alone.
#
# transformers 5.24.0, models/llava_onevision/processing_llava_onevision.py,
# LlavaOnevisionProcessor._get_num_multimodal_tokens; 2026-11-28.
# Expected: the counts of two pictures add up to the placeholders that the processor writes for both
#   ("number of placeholder tokens needed for multimodal inputs with the given sizes").
# What happens: a prompt with several pictures gets no tiles, but the count includes them.
# Output seen: counted 2 x 44 = 88, written 34
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
from PIL import Image
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


pinpoints = [[32, 64], [64, 32], [64, 64]]
size = {"height": 32, "width": 32}
processor = transformers.LlavaOnevisionProcessor(
    transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
    words("<image>", "<video>"),
    transformers.LlavaOnevisionVideoProcessor(size=size),
    num_image_tokens=16,
    vision_feature_select_strategy="full",
)
pictures = [Image.new("RGB", (48, 32)) for _ in range(2)]
counted = processor._get_num_multimodal_tokens(image_sizes=[(32, 48)] * 2).num_image_tokens
ids = processor(text="<image> <image> red ?", images=[pictures])["input_ids"][0]
written = sum(token == processor.image_token_id for token in ids)
alone = processor(text="<image> red ?", images=pictures[:1])["input_ids"][0]
assert counted[0] == sum(token == processor.image_token_id for token in alone), "of one picture the count is right"
print(f"counted 2 x {counted[0]} = {sum(counted)}, written {written}")
assert sum(counted) != written, "it has changed"
PY
