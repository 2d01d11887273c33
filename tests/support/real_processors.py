"""Processors of real families over the tiny tokenizer; they need torchvision."""

from __future__ import annotations

import transformers
from tiny import START, tiny_tokenizer
from transformers import ProcessorMixin

PATCH = 8


def _template(image: str) -> str:
    return (
        "{% for message in messages %}" + START + " {{ message.role }} {% for part in message.content %}"
        "{% if part.type == 'image' %}" + image + "{% else %} {{ part.text }} {% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} " + START + " assistant {% endif %}"
    )


def internvl_processor() -> ProcessorMixin:
    """InternVL's, which cuts a picture into one to four tiles of 32 x 32 pixels and an overview."""
    tokenizer = tiny_tokenizer()
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer.add_special_tokens({"additional_special_tokens": [*names.values(), "<video>"]})
    for name, token in {**names, "video_token": "<video>"}.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    size = {"height": 4 * PATCH, "width": 4 * PATCH}
    images = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4)
    videos = transformers.InternVLVideoProcessor(size=size)
    template = _template("<IMG_CONTEXT>")
    return transformers.InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)


def pixtral_processor() -> ProcessorMixin:
    """Pixtral's, whose picture has a token for each patch and one for the end of each row of them."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]})
    patch = {"height": PATCH, "width": PATCH}
    images = transformers.PixtralImageProcessor(size={"longest_edge": 16 * PATCH}, patch_size=patch)
    return transformers.PixtralProcessor(images, tokenizer, patch_size=PATCH, chat_template=_template("[IMG]"))
