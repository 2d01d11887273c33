"""Tokenizer, processor and tiny Qwen3-VL models for the digits task; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from .pictures import CELL, vocabulary

PAD, UNKNOWN, START, END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
SPECIAL = (PAD, UNKNOWN, START, END, VISION_START, VISION_END, IMAGE, VIDEO)
PATCH, MERGE = 8, 2  # four patches of 8x8 pixels make one image token, which is one digit's cell

INIT = 0.06  # the usual 0.02 starts too flat at these widths

CHAT_TEMPLATE = (
    "{% for message in messages %}" + START + "{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + VISION_START + IMAGE + VISION_END + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Size of a tiny model; `width` is the hidden size of both the text and the vision stack."""

    layers: int
    width: int
    heads: int = 4
    vision_layers: int = 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over exactly the task's words, with Qwen-style chat markers."""
    words = [*SPECIAL, "system", "user", "assistant", *vocabulary()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[START, VISION_START, VISION_END, IMAGE, VIDEO],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _frozen(value: Any) -> Any:
    """Something that is equal for equal arguments."""
    if isinstance(value, Image.Image):
        return value.mode, value.size, value.tobytes()
    if isinstance(value, dict):
        return tuple((name, _frozen(x)) for name, x in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)


#: Calls whose results are kept: a study's runs ask the same questions, arm by arm and check by check.
KEPT = 4096
_KEPT: dict[Any, Any] = {}


class DigitsProcessor(ProcessorMixin):
    """Qwen3-VL's processor without the video half, which would need torchvision."""

    text_kwargs: ClassVar = {"return_token_type_ids": False}

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.video_token = IMAGE, VIDEO
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
        self.video_token_id = tokenizer.convert_tokens_to_ids(VIDEO)
        self.vision_start_token_id = tokenizer.convert_tokens_to_ids(VISION_START)
        self.vision_end_token_id = tokenizer.convert_tokens_to_ids(VISION_END)
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, *args, return_mm_token_type_ids: bool = True, **kwargs):
        """As any processor; what it was asked before, such as the questions of every evaluation, it has kept."""
        kwargs["return_mm_token_type_ids"] = return_mm_token_type_ids
        if isinstance(texts := kwargs.get("text"), list) and len(texts) > 1:  # a batch of training, asked once
            return super().__call__(*args, **kwargs)
        key = _frozen([vars(self.image_processor), len(self.tokenizer), args, kwargs])
        if (found := _KEPT.get(key)) is None:
            found = super().__call__(*args, **kwargs)
            if len(_KEPT) == KEPT:
                del _KEPT[next(iter(_KEPT))]
            _KEPT[key] = found
        return type(found)(dict(found))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """The placeholders of one image: one for every merged patch."""
        merged = self.image_processor.merge_size**2
        return self.image_token * int(image_inputs["image_grid_thw"][image_idx].prod() // merged)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model takes."""
        return [*super().model_input_names, "mm_token_type_ids"]


def build_processor() -> DigitsProcessor:
    """Processor for pictures of two or three cells: one image token per cell."""
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        temporal_patch_size=1,
        merge_size=MERGE,
        size={"shortest_edge": 2 * CELL**2, "longest_edge": 3 * CELL**2},
        image_mean=[0.2] * 3,
        image_std=[0.3] * 3,
    )
    return DigitsProcessor(image_processor=image_processor, tokenizer=build_tokenizer())


def build_model(shape: Shape, processor: DigitsProcessor, seed: int) -> Qwen3VLForConditionalGeneration:
    """A randomly initialised Qwen3-VL of the given shape (float32, CPU) for this processor's vocabulary."""
    tokenizer, head_dim = processor.tokenizer, shape.width // shape.heads
    pairs = head_dim // 2
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.width,
            "intermediate_size": 2 * shape.width,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "head_dim": head_dim,
            "max_position_embeddings": 256,
            "initializer_range": INIT,
            "pad_token_id": tokenizer.pad_token_id,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3],
            },
        },
        vision_config={
            "depth": shape.vision_layers,
            "hidden_size": shape.width,
            "intermediate_size": 2 * shape.width,
            "num_heads": shape.heads,
            "patch_size": PATCH,
            "temporal_patch_size": 1,
            "spatial_merge_size": MERGE,
            "out_hidden_size": shape.width,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": [0],
            "initializer_range": INIT,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    # a sampled placeholder would claim pixels that do not exist
    generation.suppress_tokens = tokenizer.convert_tokens_to_ids([VISION_START, VISION_END, IMAGE, VIDEO])
    return model
