"""What a training step runs on: named pairs of models with random weights, and prompts with synthetic images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, Qwen3VLConfig

from vgs.models.groups import PromptGroup, response_lengths
from vgs.planning.model_size import QWEN3_VL

from .step_hybrids import HYBRIDS


def _toy(hidden: int, layers: int, vocabulary: int, tied: bool) -> Qwen3VLConfig:
    """A model of the same build that a CPU trains."""
    return Qwen3VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": hidden // 32,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_interleaved": True,
                "mrope_section": [6, 5, 5],
            },
            "tie_word_embeddings": tied,
            "initializer_range": 0.1,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.1,
        },
        image_token_id=2047,
        video_token_id=2046,
        vision_start_token_id=2045,
        vision_end_token_id=2044,
        tie_word_embeddings=tied,
    )


#: (student, teacher) by name.
PAIRS: dict[str, tuple[Callable[[], PretrainedConfig], Callable[[], PretrainedConfig]]] = {
    **{f"8b-{size.lower()}": (QWEN3_VL[size], QWEN3_VL["8B"]) for size in ("2B", "4B", "8B")},
    "small": (partial(_toy, 96, 3, 2048, True), partial(_toy, 128, 3, 2048, False)),
    "medium": (partial(_toy, 256, 4, 8192, True), partial(_toy, 512, 6, 8192, False)),
    **HYBRIDS,
}


@dataclass(frozen=True)
class Load:
    """The batch of one optimizer step.

    Attributes:
        prompts, generations: P prompts with G responses each.
        micro_batch: responses of one pass with gradient, the same for every method; a multiple of G.
        grid: rows and columns of an image's patches. prompt: text tokens of a prompt.
        shortest, longest: range of the responses' lengths, drawn from a fixed seed.
        sampled: tokens that the rollout is measured at; None means the longest response.
        seed: of prompts and lengths.
    """

    prompts: int
    generations: int
    micro_batch: int
    grid: tuple[int, int]
    prompt: int
    shortest: int
    longest: int
    sampled: int | None = None
    seed: int = 0

    @property
    def patches(self) -> int:
        """Of one image."""
        return self.grid[0] * self.grid[1]


#: Images of 1,024 x 1,024 pixels (1,024 tokens), 200 prompt tokens, responses of 500 to 2,000, as in the paper.
PAPER = {
    generations: Load(8 // generations, generations, 4, (64, 64), 200, 500, 2000, sampled=64) for generations in (1, 4)
}
#: One response alone: the least that a pass can hold.
SINGLE = replace(PAPER[1], prompts=1, micro_batch=1)
#: For pairs that a CPU trains, the second with a sixteenth of the paper's lengths.
TOYS = {
    "small": {generations: Load(4 // generations, generations, 4, (8, 8), 8, 8, 24) for generations in (1, 4)},
    "medium": {generations: Load(8 // generations, generations, 4, (16, 16), 12, 31, 125) for generations in (1, 4)},
}
TOYS |= {f"{toy}-qwen3.5": loads for toy, loads in [*TOYS.items()]}
#: Gemma 4 makes a token of three by three patches: as many tokens as two by two of the others make, and 280 in full.
GEMMA_GRIDS = {"small": (12, 12), "medium": (24, 24)}
TOYS |= {
    f"{toy}-gemma4": {count: replace(load, grid=grid) for count, load in TOYS[toy].items()}
    for toy, grid in GEMMA_GRIDS.items()
}


def paper_load(pair: str, generations: int) -> Load:
    """The paper's load for a pair of real sizes; more than four responses to a prompt are one pass.

    Gemma 4 sees an image as 280 tokens.
    """
    size = max(4, generations)
    load = PAPER.get(generations, replace(PAPER[4], prompts=2, generations=generations, micro_batch=size))
    return replace(load, grid=(42, 60)) if "gemma" in pair else load


def _image(load: Load, config: PretrainedConfig) -> tuple[int, dict[str, Tensor]]:
    """Tokens of an image, and the field that says where its patches are."""
    height, width = load.grid
    side = getattr(config.vision_config, "pooling_kernel_size", None)
    if side is None:
        return load.patches // config.vision_config.spatial_merge_size**2, {
            "image_grid_thw": torch.tensor([[1, height, width]])
        }
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    return load.patches // side**2, {"image_position_ids": places[None]}


def make_groups(load: Load, config: PretrainedConfig) -> list[PromptGroup]:
    """The prompts of a step without their pixels, the same for all methods and students of a vocabulary."""
    generator = torch.Generator().manual_seed(load.seed)
    names = [("vision_start_token_id", "boi_token_id"), ("vision_end_token_id", "eoi_token_id")]
    start, end = (next(value for name in pair if (value := getattr(config, name, None))) for pair in names)
    # Text tokens lie below all placeholders.
    first = min(config.get_text_config().vocab_size, config.image_token_id, config.video_token_id, start, end)

    def text(length: int) -> Tensor:
        return torch.randint(1, first, (length,), generator=generator)

    image_tokens, places = _image(load, config)
    groups = []
    for _ in range(load.prompts):
        question = text(load.prompt)
        image = torch.full((image_tokens,), config.image_token_id)
        ids = torch.cat([torch.tensor([start]), image, torch.tensor([end]), question])
        lengths = torch.randint(load.shortest, load.longest + 1, (load.generations,), generator=generator).tolist()
        images = {**places, "mm_token_type_ids": (ids == config.image_token_id).long()}
        groups.append(PromptGroup(ids, question, tuple(map(text, lengths)), images))
    return groups


def add_pixels(groups: list[PromptGroup], config: PretrainedConfig, device: str) -> list[PromptGroup]:
    """The same prompts with random images on a device."""
    vision = config.vision_config
    width = 3 * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    generator = torch.Generator(device).manual_seed(0)

    def pixels(group: PromptGroup) -> Tensor:
        if "image_grid_thw" in group.images:
            shape = (int(group.images["image_grid_thw"].prod()), width)
            return torch.randn(shape, generator=generator, device=device)
        # Gemma 4 takes values between 0 and 1, image by image.
        return torch.rand(1, group.images["image_position_ids"].shape[1], width, generator=generator, device=device)

    return [replace(group, images={**group.images, "pixel_values": pixels(group)}) for group in groups]


def micro_batches(groups: list[PromptGroup], load: Load) -> list[list[PromptGroup]]:
    """The step's prompts in passes of ``load.micro_batch`` responses."""
    size = load.micro_batch // load.generations
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def response_tokens(groups: list[PromptGroup]) -> int:
    return sum(response_lengths(groups))


def make_model(config: PretrainedConfig, dtype: torch.dtype, device: str, *, trainable: bool) -> nn.Module:
    """A model with random weights, built where it stays.

    Args:
        config: of a vision-language model.
        dtype: of its weights.
        device: where it is.
        trainable: with gradient checkpointing, in training mode; False: frozen, in evaluation mode.
    """
    torch.manual_seed(int(trainable))
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if trainable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()
    return model.requires_grad_(False).eval()
