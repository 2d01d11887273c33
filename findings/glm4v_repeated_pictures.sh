#!/usr/bin/env bash
# With num_return_sequences above 1, GLM-4V mixes up the pictures of a prompt that has two.
#
# transformers 5.24.0, models/glm4v/modeling_glm4v.py, Glm4vForConditionalGeneration._expand_multimodal_outputs, inner
# function repeat_tensor_or_list: it repeats each picture of a prompt by itself, where the method that it replaces
# (generation/utils.py, GenerationMixin._expand_multimodal_outputs) repeats the prompt's pictures together. glm46v,
# glm4v_moe, glm_ocr and glm5_next have the same function (read, not run); 2026-11-30.
# Expected: every row is sampled from the prompt as it is, so that a plain forward over the row's tokens and the two
#   pictures A and B gives its tokens the same scores.
# What happens: of 4 rows, the first two see A in both places and the others B: the features A A A A B B B B go to the
#   rows in order. No error. With one response, and in Qwen2.5-VL, whose prompts look alike, scores are right.
# Output seen: largest difference of a row's log-probabilities from those of a plain forward, in nats
#   Qwen2.5-VL, 1 response:  [0.0]
#   Qwen2.5-VL, 4 responses: [0.0, 0.0, 0.0, 0.0]
#   GLM-4V, 1 response:      [0.0]
#   GLM-4V, 4 responses:     [3.2, 2.95, 3.61, 3.61]
#   GLM-4V, 4 responses, from forwards over pictures AA, AA, BB, BB: [0.0, 0.0, 0.0, 0.0]
set -euo pipefail
if [ -z "${PYTHON:-}" ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    python3 -m venv "$folder"
    "$folder/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
    PYTHON="$folder/bin/python"
fi
"$PYTHON" - <<'PY'
import numpy
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

ROUNDING = 1e-3  # nats
TEXT = {
    "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
}
VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
GLM = ["<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]


def words(specials):
    """A tokenizer of whole words, whose special tokens are these."""
    names = ["<pad>", "</s>", "<unk>", *specials, "which", "is", "red", "?"]
    backend = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(specials))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def randomly(model):
    """With weights large enough for a picture to matter."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def glm():
    tokenizer = words(GLM)
    ids = dict(zip(["image", "video", "image_start", "image_end", "video_start", "video_end"], range(3, 9)))
    rope = {**TEXT["rope_parameters"], "partial_rotary_factor": 1.0}
    config = transformers.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config={**VISION, "image_size": 112},
        **{f"{name}_token_id": index for name, index in ids.items()},
    )
    parts = transformers.Glm4vImageProcessor(), tokenizer, transformers.Glm4vVideoProcessor()
    one = "<|begin_of_image|> <|image|> <|end_of_image|>"
    return randomly(transformers.Glm4vForConditionalGeneration(config)), transformers.Glm4vProcessor(*parts), one


def qwen():
    tokenizer = words(QWEN)
    ids = dict(zip(["image", "video", "vision_start", "vision_end"], range(3, 7)))
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT, vision_config={**VISION, "fullatt_block_indexes": [0]},
        **{f"{name}_token_id": index for name, index in ids.items()},
    )
    parts = transformers.Qwen2VLImageProcessor(), tokenizer, transformers.Qwen2VLVideoProcessor()
    one = "<|vision_start|> <|image_pad|> <|vision_end|>"
    model = randomly(transformers.Qwen2_5_VLForConditionalGeneration(config))
    return model, transformers.Qwen2_5_VLProcessor(*parts), one


draw = numpy.random.default_rng(0)
A, B = (Image.fromarray(draw.integers(0, 256, (112, 112, 3), dtype=numpy.uint8)) for _ in range(2))


def inputs_of(processor, one, pictures):
    """What the library's processor makes of a prompt with two pictures."""
    inputs = processor(text=[f"{one} {one} which is red ?"], images=[pictures], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert inputs["image_grid_thw"].tolist() == [[1, 8, 8]] * 2 and len(inputs["pixel_values"]) == 2 * 64
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 2 * 16
    return dict(inputs)


@torch.no_grad()
def plain(model, sequence, inputs, start):
    """Log-probabilities after the prompt, from one forward over prompt and response."""
    kinds = torch.zeros_like(sequence)[None]
    kinds[:, :start] = inputs["mm_token_type_ids"]
    logits = model(
        input_ids=sequence[None], attention_mask=torch.ones_like(kinds), mm_token_type_ids=kinds,
        pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"],
    ).logits
    return logits[0, start - 1 : -1].log_softmax(-1)


@torch.no_grad()
def gaps(family, count, seen=None):
    """The largest difference of each row from a plain forward over the prompt's pictures, or over these."""
    model, processor, one = family()
    inputs = inputs_of(processor, one, [A, B])
    start = inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    output = model.generate(
        **inputs, do_sample=True, top_k=0, min_new_tokens=4, max_new_tokens=4, num_return_sequences=count,
        suppress_tokens=list(processor.tokenizer.added_tokens_decoder),  # no placeholder in a response
        return_dict_in_generate=True, output_logits=True,
    )
    found = torch.stack(output.logits, 1).log_softmax(-1)
    pairs = [inputs_of(processor, one, pair) for pair in seen or [[A, B]] * count]
    rows = zip(found, output.sequences, pairs, strict=True)
    return [(row - plain(model, ids, pair, start)).abs().max().item() for row, ids, pair in rows]


def shown(values):
    return [round(value, 2) for value in values]


print("largest difference of a row's log-probabilities from those of a plain forward, in nats")
right = {
    "Qwen2.5-VL, 1 response: ": gaps(qwen, 1),
    "Qwen2.5-VL, 4 responses:": gaps(qwen, 4),
    "GLM-4V, 1 response:     ": gaps(glm, 1),
}
for name, values in right.items():
    print(name, shown(values))
wrong, mixed = gaps(glm, 4), gaps(glm, 4, [[A, A], [A, A], [B, B], [B, B]])
print("GLM-4V, 4 responses:    ", shown(wrong))
print("GLM-4V, 4 responses, from forwards over pictures AA, AA, BB, BB:", shown(mixed))
assert all(max(values) < ROUNDING for values in right.values()), "the comparison is not right"
assert min(wrong) > 100 * ROUNDING and max(mixed) < ROUNDING, "it has changed"
PY
