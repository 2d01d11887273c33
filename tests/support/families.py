"""Tiny random models of every family that packs, and prompts as the family's own processor would prepare them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vgs.models.groups import PER_TOKEN_FIELDS, PromptGroup

VOCABULARY = 60
IMAGE, START, END, FIRST_WORD = 3, 5, 6, 8
WINDOW = 6  # of sliding attention: shorter than an image and a prompt
PATCH = 4

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": PATCH,
}

Size = Any  # what a family calls the size of an image: its grid, or the number of its tiles
Images = tuple[list[int], dict[str, Tensor]]  # placeholders of each image, and the image fields


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    Attributes:
        build: a random model in float32.
        images: ``images(sizes, generator)``: random images of these sizes in one prompt.
        small, large: two sizes.
        token_field: the name of its per-token field, if it has one.
    """

    build: Callable[[], nn.Module]
    images: Callable[[Sequence[Size], torch.Generator], Images]
    small: Size = 1
    large: Size = 1
    token_field: str | None = None

    def group(self, sizes: Sequence[Size], lengths: Sequence[int], seed: int) -> PromptGroup:
        """A prompt with images of these sizes (none: a text-only sample), and responses of these lengths."""
        generator = torch.Generator().manual_seed(seed)

        def words(count: int) -> Tensor:
            return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator)

        counts, images = self.images(sizes, generator) if sizes else ([], {})
        opening, question = words(2 + seed % 3), words(3 + seed % 4)
        spans = [torch.tensor([START, *[IMAGE] * count, END]) for count in counts]
        prompt = torch.cat([opening, *spans, question])
        if self.token_field:
            images[self.token_field] = (prompt == IMAGE).long()
        return PromptGroup(prompt, torch.cat([opening, question]), tuple(words(n) for n in lengths), images)

    def groups(self) -> list[PromptGroup]:
        """One image, no image, two images of different sizes; 3, 2 and 1 responses."""
        return [
            self.group([self.small], [4, 1, 9], 0),
            self.group([], [3, 6], 1),
            self.group([self.large, self.small], [5], 2),
        ]


@contextmanager
def rows_read(model: nn.Module) -> Iterator[list[tuple[int, int]]]:
    """Collects the sizes [rows, columns] of all tokens that enter the language model."""
    seen: list[tuple[int, int]] = []

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].ndim == 2:  # and not the one token that transformers asks for
            seen.append(tuple(args[0].shape))

    handle = model.get_input_embeddings().register_forward_pre_hook(collect)
    try:
        yield seen
    finally:
        handle.remove()


def separate_rows(model: nn.Module, group: PromptGroup, with_image: bool) -> Tensor:
    """[N, D] hidden states that predict the responses, from one plain forward for each of them."""
    prompt = group.prompt_ids if with_image else group.text_prompt_ids
    fields = {name: value for name, value in group.images.items() if with_image or name in PER_TOKEN_FIELDS}
    rows = []
    for response in group.responses:
        ids = torch.cat([prompt, response])[None]
        for name in PER_TOKEN_FIELDS:
            if name in fields:
                kinds = torch.zeros_like(ids)
                if with_image:
                    kinds[0, : len(prompt)] = group.images[name]
                fields[name] = kinds
        states = model.base_model(
            input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **fields
        ).last_hidden_state
        rows.append(states[0, len(prompt) - 1 : -1])
    return torch.cat(rows)


def separate(model: nn.Module, groups: Sequence[PromptGroup]) -> list[Tensor]:
    """As ``score_groups``, from plain forwards."""
    return [torch.cat([separate_rows(model, group, with_image) for group in groups]) for with_image in (True, False)]


def gradients_of(model: nn.Module, rows: Sequence[Tensor], text_tokens: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of a random linear functional of both views' rows [N, D].

    Args:
        text_tokens: [N] bool, the tokens whose text-only rows count; None for all.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator) for x in rows]
    if text_tokens is not None:
        weights[1] *= text_tokens[:, None]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    value = sum((x * weight).sum() for x, weight in zip(rows, weights, strict=True))
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compare gradients by parameter, relative to the largest of all."""
    assert actual.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max() <= tolerance * largest, name


def shaken(model: nn.Module) -> nn.Module:
    """The model with every parameter random and large, so that rows are distinct and every part of it matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = 0.2 * noise
        else:
            parameter.data += 0.1 * noise
    return model.eval()


def _builder(model_class: type, config: Callable[[], PreTrainedConfig]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return shaken(model_class._from_config(config(), attn_implementation="sdpa"))

    return build


def _grids(features: int) -> Callable[[Sequence[Size], torch.Generator], Images]:
    def images(sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> Images:
        grid = torch.tensor([[1, height, width] for height, width in sizes])
        patches = grid.prod(dim=1)
        pixels = torch.randn(int(patches.sum()), features, generator=generator)
        return (patches // 4).tolist(), {"pixel_values": pixels, "image_grid_thw": grid}

    return images


def _tiles(placeholders: int) -> Callable[[Sequence[Size], torch.Generator], Images]:
    def images(sizes: Sequence[int], generator: torch.Generator) -> Images:
        pixels = torch.randn(sum(sizes), 3, VISION["image_size"], VISION["image_size"], generator=generator)
        return [size * placeholders for size in sizes], {"pixel_values": pixels}

    return images


def _smolvlm_images(sizes: Sequence[int], generator: torch.Generator) -> Images:
    counts, fields = _tiles(4)(sizes, generator)
    pixels = fields["pixel_values"][None]
    return counts, {"pixel_values": pixels, "pixel_attention_mask": torch.ones_like(pixels[:, :, 0]).long()}


def _pixtral_images(sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> Images:
    largest = [max(side) * PATCH for side in zip(*sizes, strict=True)]
    pixels = torch.zeros(len(sizes), 3, *largest)
    for image, (height, width) in zip(pixels, sizes, strict=True):
        image[:, : height * PATCH, : width * PATCH] = torch.randn(3, height * PATCH, width * PATCH, generator=generator)
    return [h * w for h, w in sizes], {"pixel_values": pixels, "image_sizes": torch.tensor(sizes) * PATCH}


def _llava_next_images(sizes: Sequence[tuple[int, int]], generator: torch.Generator) -> Images:
    """Sizes in tiles; every image comes once as a whole as well."""
    side, tiles = VISION["image_size"], [1 + height * width for height, width in sizes]
    pixels = torch.zeros(len(sizes), max(tiles), 3, side, side)
    for image, count in zip(pixels, tiles, strict=True):
        image[:count] = torch.randn(count, 3, side, side, generator=generator)
    across = side // PATCH
    counts = [across**2 + height * across * (width * across + 1) for height, width in sizes]  # a newline per row
    return counts, {"pixel_values": pixels, "image_sizes": torch.tensor(sizes) * side}


def _qwen25() -> PreTrainedConfig:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": PATCH,
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [1],
        "out_hidden_size": TEXT["hidden_size"],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    return Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=4,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def _smolvlm() -> PreTrainedConfig:
    return SmolVLMConfig(
        text_config=LlamaConfig(**TEXT).to_dict(), vision_config=VISION, image_token_id=IMAGE, scale_factor=2
    )


def _internvl() -> PreTrainedConfig:
    side = VISION["image_size"]
    vision = {**VISION, "image_size": (side, side), "patch_size": (PATCH, PATCH)}
    return InternVLConfig(
        text_config=Qwen3Config(**TEXT), vision_config=vision, image_token_id=IMAGE, image_seq_length=4
    )


def _llava() -> PreTrainedConfig:
    return LlavaConfig(text_config=Qwen2Config(**TEXT), vision_config=CLIPVisionConfig(**VISION), image_token_id=IMAGE)


def _pixtral() -> PreTrainedConfig:
    return LlavaConfig(
        text_config=MistralConfig(**TEXT, sliding_window=WINDOW),
        vision_config=PixtralVisionConfig(**{**VISION, "image_size": 64}),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def _gemma3() -> PreTrainedConfig:
    text = {**TEXT, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    return Gemma3Config(
        text_config={**text, "query_pre_attn_scalar": 16},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _llava_next() -> PreTrainedConfig:
    side = VISION["image_size"]
    return LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**VISION),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[side, 2 * side], [2 * side, 2 * side]],
    )


FAMILIES = {
    "qwen3_vl": Family(
        lambda: shaken(tiny_model(vocab_size=VOCABULARY)), _grids(384), (2, 4), (4, 6), "mm_token_type_ids"
    ),
    "qwen2_5_vl": Family(
        _builder(Qwen2_5_VLForConditionalGeneration, _qwen25), _grids(96), (2, 4), (4, 6), "mm_token_type_ids"
    ),
    "smolvlm": Family(_builder(SmolVLMForConditionalGeneration, _smolvlm), _smolvlm_images, 1, 3),
    "internvl": Family(_builder(InternVLForConditionalGeneration, _internvl), _tiles(4), 1, 3),
    "llava": Family(_builder(LlavaForConditionalGeneration, _llava), _tiles(16)),
    "llava_pixtral": Family(_builder(LlavaForConditionalGeneration, _pixtral), _pixtral_images, (2, 3), (4, 2)),
    "gemma3": Family(_builder(Gemma3ForConditionalGeneration, _gemma3), _tiles(4), token_field="token_type_ids"),
}
LLAVA_NEXT = Family(_builder(LlavaNextForConditionalGeneration, _llava_next), _llava_next_images, (1, 2), (2, 2))
