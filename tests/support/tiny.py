"""Tiny random Qwen3-VL pairs, a word-level tokenizer and samples: what the trainer tests need, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vgs.digits.models import (
    CHAT_TEMPLATE,
    END,
    IMAGE,
    PAD,
    START,
    UNKNOWN,
    VIDEO,
    VISION_END,
    VISION_START,
    DigitsProcessor,
)

SPECIAL = [PAD, END, START, IMAGE, VIDEO, VISION_START, VISION_END, UNKNOWN]
WORDS = (
    *("system", "user", "assistant", "what", "is", "in", "the", "picture", "answer", "a", "b", "c", "d"),
    *("red", "green", "blue", "one", "two", "three", "\\boxed", "{", "}", ":", "?"),
)
IMAGE_SIZE = 32  # two by two merged patches of 8 x 8 pixels


def tiny_tokenizer(words: Iterable[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), behavior="removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:7]})
    return tokenizer


def tiny_processor() -> DigitsProcessor:
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=IMAGE_SIZE**2, max_pixels=IMAGE_SIZE**2 * 4
    )
    return DigitsProcessor(image_processor, tiny_tokenizer(), chat_template=CHAT_TEMPLATE)


def tiny_model(
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    tie: bool = True,
    scale: float = 0.2,
    vocab_size: int | None = None,
) -> Qwen3VLForConditionalGeneration:
    """A random model in float32; ``scale`` is the standard deviation of its weights (large: peaked, distinct rows)."""
    ids = {token: index for index, token in enumerate(SPECIAL)}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": vocab_size or len(SPECIAL) + len(WORDS),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "initializer_range": scale,
            "tie_word_embeddings": tie,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
            "initializer_range": scale,
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids[END]
    return model


def tiny_image(seed: int, width: int = IMAGE_SIZE, height: int = IMAGE_SIZE) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy(), mode="RGB")


def tiny_samples(count: int = 8) -> list[dict]:
    """Samples in the shared format, with prompts of different lengths and every third image twice as wide."""
    questions = ["what is in the picture ?", "a b or c ?", "what is the answer : one two three ?", "red ?"]
    return [
        {
            "prompt": [{"role": "user", "content": questions[index % len(questions)]}],
            "images": [tiny_image(index, width=IMAGE_SIZE * (2 if index % 3 == 2 else 1))],
            "answer": "abcd"[index % 4],
        }
        for index in range(count)
    ]


def save_tiny_checkpoint(path: Path, **model_options) -> Path:
    """Saves a tiny model and the real processor of its family over the tiny words, as the Auto classes read them."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    area = {"shortest_edge": IMAGE_SIZE**2, "longest_edge": 4 * IMAGE_SIZE**2}
    images, videos = Qwen2VLImageProcessor(**sizes, size=area), Qwen3VLVideoProcessor(**sizes, size=area)
    tiny_model(**model_options).save_pretrained(path)
    Qwen3VLProcessor(images, tiny_tokenizer(), videos, chat_template=CHAT_TEMPLATE).save_pretrained(path)
    return path


def trainer_options(output_dir: Path, **options) -> dict:
    """Keyword arguments of a ``VGSConfig`` for a few fast steps on the CPU; ``options`` override them."""
    defaults = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "loss_backend": "torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    return {**defaults, **options}


def plain_rows(
    model: nn.Module, processor: DigitsProcessor, sample: dict, response: list[int], with_image: bool
) -> torch.Tensor:
    """[T, D] hidden states of one response in one view, through the plain public calls of processor and model."""
    image = [{"type": "image", "image": sample["images"][0]}] if with_image else []
    text = {"type": "text", "text": sample["prompt"][0]["content"]}
    messages = [{"role": "user", "content": [*image, text]}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[rendered], images=[sample["images"]] if with_image else None, return_tensors="pt")
    ids = torch.cat([inputs.pop("input_ids"), torch.tensor([response])], dim=1)
    kinds = inputs.pop("mm_token_type_ids")
    inputs["mm_token_type_ids"] = torch.cat([kinds, kinds.new_zeros(1, len(response))], dim=1)
    inputs["attention_mask"] = torch.ones_like(ids)
    states = model(input_ids=ids, output_hidden_states=True, **inputs).hidden_states[-1]
    return states[0, -len(response) - 1 : -1]
