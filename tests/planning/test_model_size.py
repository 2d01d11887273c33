"""Counted sizes and work against real models: parameters, FLOPs by PyTorch's counter, bytes of saved tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from tiny import IMAGE_SIZE, tiny_model, tiny_processor, tiny_samples
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vgs.planning.model_size import FORWARD, QWEN3_VL, TRAINING, ModelSize, Work

PATCHES = (IMAGE_SIZE // 8) ** 2
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 8,
    "image_size": 32,
}
FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llava": lambda: transformers.LlavaConfig(
        text_config={"model_type": "llama", **TEXT},
        vision_config={"model_type": "clip_vision_model", **VISION},
        image_token_id=5,
    ),
    "gemma3": lambda: transformers.Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4),
    "internvl": lambda: transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={**VISION, "patch_size": [8, 8], "image_size": [32, 32]},
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(
        text_config={"model_type": "llama", **TEXT}, vision_config=VISION, scale_factor=2
    ),
}
MERGED = {"llava": 1, "gemma3": 4, "internvl": 4, "smolvlm": 4}


def image_inputs(count: int = 2) -> tuple[dict[str, torch.Tensor], int, list[int]]:
    """Keyword arguments of a forward of ``count`` equal rows, their length, and the patches of every image."""
    processor, sample = tiny_processor(), tiny_samples(1)[0]
    content = [{"type": "image"}, {"type": "text", "text": sample["prompt"][0]["content"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    inputs = processor(text=[text] * count, images=[sample["images"]] * count, return_tensors="pt")
    assert inputs["attention_mask"].all()
    return dict(inputs), inputs["input_ids"].shape[1], [PATCHES] * count


def counted(function: Callable[[], object]) -> int:
    """FLOPs but for the rotary angles, an outer product that older transformers write as a matrix product."""
    with FlopCounterMode(display=False) as counter:
        function()
    by_module = counter.get_flop_counts()
    rotary = [name for name in by_module if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(sum(by_module[name].values()) for name in rotary)


@pytest.mark.parametrize("tie", [True, False])
def test_parameters_by_part(tie: bool) -> None:
    model = tiny_model(tie=tie)
    size = ModelSize.of(model.config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.tied is tie
    assert size.head == (0 if tie else model.lm_head.weight.numel())
    assert size.vision == sum(parameter.numel() for parameter in model.model.visual.parameters())
    assert size.embeddings == model.model.language_model.embed_tokens.weight.numel()


@pytest.mark.parametrize(("name", "total"), [("2B", 2127532032), ("4B", 4437815808), ("8B", 8767123696)])
def test_published_sizes(name: str, total: int) -> None:
    size = ModelSize.of(QWEN3_VL[name]())
    assert size.parameters == total
    assert size.tied is (name != "8B")
    assert size.patches_per_token == 4


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name: str) -> None:
    config = FAMILIES[name]()
    size = ModelSize.of(config)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.patches_per_token == MERGED[name]
    assert size.mergers > 0
    ids = torch.arange(10, 22)[None]
    model.set_attn_implementation("eager")
    total = counted(lambda: model(input_ids=ids, use_cache=False))
    assert total == size.decoder_flops(12, 12 * 12) + size.head_flops(12)


def test_forward_flops() -> None:
    model = tiny_model(tie=False)
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
    inputs, tokens, patches = image_inputs()
    size = ModelSize.of(model.config)
    expected = [
        size.decoder_flops(2 * tokens, 2 * tokens * tokens),
        size.vision_flops(patches),
        size.head_flops(2 * tokens),
    ]
    assert counted(lambda: model(**inputs)) == sum(expected)
    tower = model.model.visual
    grid = inputs["image_grid_thw"]
    assert counted(lambda: tower(inputs["pixel_values"], grid_thw=grid)) == expected[1]


@pytest.mark.parametrize("work", [TRAINING, Work(weights=False)])
def test_backward_flops(work: Work) -> None:
    model = tiny_model(tie=False).requires_grad_(work.weights)
    model.set_attn_implementation("eager")
    size = ModelSize.of(model.config)
    tokens = 12
    rows = torch.randn(1, tokens, 32, requires_grad=True)
    total = counted(lambda: model(inputs_embeds=rows, use_cache=False).logits.sum().backward())
    pairs = tokens * tokens
    attention = size.decoder_flops(0, pairs)
    # Attention that stores its scores has four products in its backward, not five.
    assert total == size.decoder_flops(tokens, pairs, work) + size.head_flops(tokens, work) - attention / 2


def test_vision_backward_flops() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs, _, patches = image_inputs()
    size = ModelSize.of(model.config)

    def run() -> None:
        output = model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        features = [output.pooler_output, *output.deepstack_features]
        sum(feature.sum() for feature in features).backward()

    attention = 4 * 32 * 2 * sum(count * count for count in patches)
    # Only one layer feeds the last merger and DeepStack, so every layer has both gradients.
    assert counted(run) == size.vision_flops(patches, TRAINING) - attention / 2


def test_fused_attention_backward_is_two_and_a_half_forwards() -> None:
    shape = (1, 2, 12, 16)
    forward = sdpa_flop_count(shape, shape, shape)
    assert TRAINING.attention == 1 + sdpa_backward_flop_count(shape, shape, shape, shape) / forward
    assert FORWARD.attention == 1


def test_checkpointing_runs_the_layers_once_more() -> None:
    model = tiny_model(tie=False).train()
    model.set_attn_implementation("eager")
    size = ModelSize.of(model.config)
    rows = torch.randn(1, 12, 32, requires_grad=True)

    def run() -> None:
        model(inputs_embeds=rows, use_cache=False).logits.sum().backward()

    plain = counted(run)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    extra = counted(run) - plain
    predicted = size.decoder_flops(12, 144, Work(recompute=True)) - size.decoder_flops(12, 144, TRAINING)
    # PyTorch stops the repetition before the layer's last product, whose result nobody needs.
    last = 2 * 12 * 32 * 64 * 2
    assert extra == predicted - last


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Bytes of the distinct tensors that a forward keeps for its backward, parameters and their casts left out."""
    weights = {tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1}
    weights |= {shape[::-1] for shape in weights}
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights and not isinstance(tensor, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(size for _, size in storages.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoder_activation_bytes(autocast: bool, checkpointing: bool) -> None:
    model = tiny_model(hidden=64).to(torch.float32 if autocast else torch.bfloat16).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = 257
    rows = torch.randn(1, tokens, 64, dtype=model.dtype, requires_grad=True)

    def run() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model.model(inputs_embeds=rows, use_cache=False).last_hidden_state

    size = ModelSize.of(model.config)
    predicted = size.activation_bytes(tokens, autocast=autocast, checkpointing=checkpointing)
    if checkpointing:  # one layer is only rebuilt in the backward
        predicted -= size.text.layer_bytes(autocast, rms=True) * tokens
    actual = saved_bytes(model, run)
    # What is not predicted: rotary embeddings and the scale of every norm's rows, which only tiny models notice.
    assert predicted < actual < predicted * 1.25


@pytest.mark.parametrize("autocast", [False, True])
def test_vision_activation_bytes(autocast: bool) -> None:
    model = tiny_model().to(torch.float32 if autocast else torch.bfloat16).train()
    inputs, _, patches = image_inputs(count=7)  # as many rows as no matrix has

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model.model.visual(inputs["pixel_values"].to(model.dtype), grid_thw=inputs["image_grid_thw"])
        return [output.pooler_output, *output.deepstack_features]

    predicted = ModelSize.of(model.config).activation_bytes(0, sum(patches), autocast=autocast)
    actual = saved_bytes(model, run) - 2 * inputs["pixel_values"].numel()
    assert predicted < actual < predicted * 1.25
