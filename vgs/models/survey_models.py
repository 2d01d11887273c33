"""Tiny models of all families, from their default configs, and a prompt with a picture for each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from .families import backbone, nested_configs
from .groups import PER_TOKEN_FIELDS, PromptGroup
from .image_fields import IMAGE_FIELDS
from .shallow import shallow_config, shallow_copy
from .survey_tables import FIELDS, GIVEN, OPTIONS, SIDE

#: Every family that ``AutoModelForImageTextToText`` can load -> the name of its class.
SURVEYED: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
WIDTH, INTERMEDIATE, VOCABULARY, DEPTH = 256, 128, 512, 2
FIRST_WORD = 100  # ids below stand for pictures and the like
PROMPTS = (40, 90)  # words of the two prompts
#: Families without an image processor of their own -> whose they use.
PROCESSORS = {
    "fast_vlm": "llava",
    "glm4v_moe": "glm4v",
    "glm_ocr": "glm4v",
    "mistral4": "mistral3",
    "qwen2_5_omni_thinker": "qwen2_vl",
    "qwen3_omni_moe_thinker": "qwen2_vl",
    "qwen3_vl_moe": "qwen2_vl",
}

#: Names that configs have for the token which stands for a part of a picture.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "img_context_token_id", "image_patch_id")
_WIDTHS = re.compile(r"(.*_)?(hidden_size|embed_dim|hidden_dim|d_model|width|projection_dim|out_dim|output_dim)")
_DEPTHS = re.compile(r"(num_hidden_layers|depth|num_layers|n_layers|encoder_layers|layers)")
_MARKS = re.compile(r"\w+_token_(id|index)|im_(start|end|newline)_id|image_patch_id")
#: Names of sizes -> what they become at most.
_SIZES = {
    "intermediate_size": INTERMEDIATE,
    "ffn_hidden_size": INTERMEDIATE,
    "mlp_dim": INTERMEDIATE,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "intermediate_size_mlp": INTERMEDIATE,
    "dense_intermediate_size": INTERMEDIATE,
    "projection_intermediate_size": INTERMEDIATE,
    "shared_intermediate_size": 64,
    "shared_experts_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "unpadded_vocab_size": VOCABULARY,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "linear_num_heads": 2,
    "index_n_heads": 16,  # with few, many scores are 0 and the choice among them is arbitrary
    "mamba_num_heads": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "hidden_size_per_layer_input": 16,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "image_size": SIDE,
}


def tiny_config(family: str) -> PreTrainedConfig:
    """The default config of a family, so small that a model of it has a few million parameters.

    Args:
        family: of ``SURVEYED``.
    """
    config = shallow_config(CONFIG_MAPPING[family](**GIVEN.get(family, {})))
    text = config.get_text_config()
    numbers = iter(range(4, FIRST_WORD))
    for part in list(nested_configs(config)):
        _shrink(part, is_text=part is text)
        _mark(part, numbers)
    for part in {id(x): x for x in (config, text)}.values():
        part.pad_token_id, part.bos_token_id, part.eos_token_id = 0, 1, 2
    for name, value in FIELDS.get(family, {}).items():
        *path, field = name.split(".")
        setattr(reduce(getattr, path, config), field, value)
    return config


def _shrink(part: PreTrainedConfig, is_text: bool) -> None:
    fields = dict(vars(part))
    for name, value in fields.items():
        if name in _SIZES and isinstance(value, (list, tuple)):
            setattr(part, name, type(value)([min(x, _SIZES[name]) for x in value]))
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in _SIZES:
            setattr(part, name, min(value, _SIZES[name]))
        elif _WIDTHS.fullmatch(name):
            setattr(part, name, min(value, WIDTH))
        elif _DEPTHS.fullmatch(name) and not is_text:
            setattr(part, name, min(value, DEPTH))
    _cut_heads(part, fields, is_text)
    for name in ("deepstack_visual_indexes", "fullatt_block_indexes", "vision_feature_layer"):
        value = getattr(part, name, None)
        if isinstance(value, (list, tuple)):
            few = [max(x, -DEPTH) if x < 0 else min(i, DEPTH - 1) for i, x in enumerate(value)][:DEPTH]
            setattr(part, name, few)
        elif isinstance(value, int):
            setattr(part, name, max(value, -DEPTH) if value < 0 else min(value, DEPTH - 1))


def _cut_heads(part: PreTrainedConfig, fields: dict[str, Any], is_text: bool) -> None:
    """Few heads that fit the width; of a text stack they keep their size."""
    names = [name for name in ("num_attention_heads", "num_heads", "encoder_attention_heads") if name in fields]
    width = next((fields[x] for x in ("hidden_size", "embed_dim", "d_model", "hidden_dim") if x in fields), None)
    if not names or not isinstance(width, int):
        return
    heads = fields[names[0]]
    count = 2 if is_text else max(1, min(width, WIDTH) // (fields.get("head_dim") or 64))
    for name in names:
        setattr(part, name, count)
    groups = fields.get("num_key_value_heads")
    if isinstance(groups, int):
        part.num_key_value_heads = 1 if groups < heads else count


def _mark(part: PreTrainedConfig, numbers: Iterator[int]) -> None:
    """Ids of their own, among the first, for all tokens that stand for something."""
    for name, value in dict(vars(part)).items():
        if not _MARKS.fullmatch(name) or name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            continue
        if isinstance(value, int):
            setattr(part, name, next(numbers))
        elif isinstance(value, (list, tuple)):
            setattr(part, name, [next(numbers) for _ in value])


def words(count: int, seed: int) -> Tensor:
    """[count] int64 random words."""
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def text_groups() -> list[PromptGroup]:
    """Two prompts without pictures."""
    return [PromptGroup(ids, ids, (ids[:1],), {}) for ids in (words(n, n) for n in PROMPTS)]


def picture_groups(family: str, model_class: type, config: PreTrainedConfig) -> list[PromptGroup]:
    """A prompt with a picture, as many placeholders for it as the model makes features of it, and one without.

    Args:
        family: of ``SURVEYED``.
        model_class: of the model with its head.
        config: of ``tiny_config``.

    Raises:
        ValueError: the family has no image processor, its processor gives fields without a rule, or the model has no
            ``get_image_features``.
    """
    fields, model = _picture_fields(family, config), shallow_copy(model_class, config, torch.device("cpu"))
    body = backbone(model)
    if not hasattr(body, "get_image_features"):
        raise ValueError("the model has no get_image_features")
    mark = next((value for name in _PLACEHOLDERS if isinstance(value := getattr(config, name, None), int)), None)
    if mark is None:
        raise ValueError("the config names no image token")
    with torch.no_grad():
        found = body.get_image_features(**fields)
    count = _count(_features(found))
    before, after = words(3, 1), words(PROMPTS[0], 2)
    ends = [
        torch.tensor([value] if isinstance(value := getattr(config, name, None), int) else [], dtype=torch.int64)
        for name in ("vision_start_token_id", "vision_end_token_id")
    ]
    ids = torch.cat([before, ends[0], torch.full((count,), mark), ends[1], after])
    plain = torch.cat([before, after])
    kinds = {
        name: (ids == mark).long() for name in PER_TOKEN_FIELDS if name in inspect.signature(body.forward).parameters
    }
    return [PromptGroup(ids, plain, (plain[:1],), {**fields, **kinds}), *text_groups()[1:]]


def _features(found: Any) -> Any:
    """What stands at the placeholders, of an output of ``get_image_features``; of one layer where several take them."""
    for name in ("pooler_output", "last_hidden_state"):
        if (value := getattr(found, name, None)) is not None:
            return value
    layers = getattr(found, "deepstack_features", None)
    return layers[0][1] if layers else found


def _count(found: Any) -> int:
    """Feature vectors of all pictures."""
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    if isinstance(found, (list, tuple)):
        return sum(_count(part) for part in found)
    raise ValueError(f"get_image_features returns a {type(found).__name__}")


def _picture_fields(family: str, config: PreTrainedConfig) -> dict[str, Tensor]:
    names = IMAGE_PROCESSOR_MAPPING_NAMES.get(PROCESSORS.get(family, family))
    if not names:
        raise ValueError("the library has no image processor for it")
    processor = getattr(transformers, names.get("torchvision") or names["pil"])
    vision = getattr(config, "vision_config", None)
    options = {**_fitting(processor, vision), **OPTIONS.get(family, {})}
    encoded = processor(**options)([[Image.new("RGB", (SIDE, SIDE), "red")]], return_tensors="pt")
    fields = {
        name: value if isinstance(value, Tensor) else torch.as_tensor(value)
        for name, value in encoded.items()
        if name in IMAGE_FIELDS
    }
    if "pixel_values" not in fields:
        raise ValueError(f"{processor.__name__} returns {', '.join(encoded)}")
    return {name: x.float() if x.is_floating_point() else x for name, x in fields.items()}


def _fitting(processor: type, vision: PreTrainedConfig | None) -> dict[str, Any]:
    """Options of an image processor that follow from the vision config and from what it has by default."""
    side, options = getattr(vision, "image_size", SIDE), {}
    side = side if isinstance(side, int) else SIDE
    shapes = {
        frozenset({"height", "width"}): {"height": side, "width": side},
        frozenset({"shortest_edge"}): {"shortest_edge": side},
        frozenset({"longest_edge"}): {"longest_edge": side},
        frozenset({"shortest_edge", "longest_edge"}): {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2},
    }
    for name in ("size", "crop_size", "max_image_size", "high_res_size"):
        default = getattr(processor, name, None)
        if isinstance(default, dict) and frozenset(default) in shapes:
            options[name] = shapes[frozenset(default)]
    patch = getattr(vision, "patch_size", None)
    if isinstance(patch, int) and (default := getattr(processor, "patch_size", None)):
        options["patch_size"] = {"height": patch, "width": patch} if isinstance(default, dict) else patch
    for name, field in (("merge_size", "spatial_merge_size"), ("temporal_patch_size", "temporal_patch_size")):
        if hasattr(processor, name):
            options[name] = getattr(vision, field, getattr(processor, name))
    return options
