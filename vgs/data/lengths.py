"""How many tokens a prompt has, and which prompts are too long."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm.auto import tqdm

from ..errors import ConfigError
from .prompts import encode_prompts, fill_images
from .sources import Samples

logger = logging.getLogger(__name__)


def prompt_length(processor: Any, sample: dict[str, Any], **template_options: Any) -> int:
    """Tokens of a sample's prompt, image tokens included.

    Args:
        processor, template_options: as in ``prompts.encode_prompts``.
        sample: ``prompt`` and ``images``.
    """
    images = processor.image_processor
    if hasattr(images, "get_number_of_image_patches"):  # Qwen-VL: no need to prepare the pixels
        messages = fill_images(sample["prompt"], sample["images"])
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **template_options)
        patches = [images.get_number_of_image_patches(image.height, image.width, {}) for image in sample["images"]]
        placeholders = sum(count // images.merge_size**2 - 1 for count in patches)
        return len(processor.tokenizer(text)["input_ids"]) + placeholders
    return encode_prompts(processor, [sample], **template_options)[0].shape[1]


def drop_long_prompts(samples: Samples, processor: Any, limit: int, **template_options: Any) -> Samples:
    """Samples whose prompt has at most ``limit`` tokens; the number of dropped ones is logged.

    Args:
        samples: those of ``load_samples``.
        processor, template_options: as in ``prompts.encode_prompts``.
        limit: of tokens, image tokens included.

    Raises:
        ConfigError: none is left.
    """
    with ThreadPoolExecutor() as pool:  # decoding images releases the interpreter lock
        lengths = pool.map(lambda i: prompt_length(processor, samples[i], **template_options), range(len(samples)))
        lengths = list(tqdm(lengths, total=len(samples), desc="prompt lengths", leave=False))
    kept = [i for i, length in enumerate(lengths) if length <= limit]
    logger.warning("%d of %d prompts are longer than %d tokens: dropped", len(samples) - len(kept), len(samples), limit)
    if not kept:
        raise ConfigError(f"No prompt of {samples.source.path} has at most max_prompt_length={limit} tokens.")
    return samples.select(kept)
