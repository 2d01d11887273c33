"""A model of the same family as another, small enough to be run twice: what a family does is seen on it.

Widths, heads and the vision tower stay, so that the same attention kernels meet the same sizes. Of the text stack's
layers one of each kind stays. Windows, chunks and lengths at which something changes become so short that a prompt of a
hundred tokens reaches beyond them. Weights are random and large, so that every part of the model matters.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .families import nested_configs

logger = logging.getLogger(__name__)

#: Lengths in tokens at which a text stack begins to do something else -> what they become at most.
LENGTHS = {
    "sliding_window": 24,
    "attention_chunk_size": 32,
    "floor_scale": 32,
    "index_topk": 16,
    "original_max_position_embeddings": 32,
}
MEMORY = Path("/proc/meminfo")
FEW_LAYERS = 4  # so many are kept as they are
EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")  # experts of a token
FEW_EXPERTS = 8
CHOSEN_LAYERS = ("moe_layers", "cross_attention_layers")  # the numbers of those layers that have it
SOURCES = ("kv_source_layers",)  # for every layer the number of that whose keys and values it takes
GROUPS = ("n_group", "topk_group")  # of experts, to choose among first


def shallow_copy(model_class: type[PreTrainedModel], config: PreTrainedConfig, device: torch.device) -> nn.Module:
    """A random float32 model of this class, in evaluation mode; the global random state stays.

    Args:
        model_class: of the model with its head.
        config: of a model of this class, of any size.
        device: where it is built.

    Raises:
        MemoryError: there is no room for it.
        Exception: what the class raises if it cannot be built so.
    """
    config = shallow_config(config)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Not by a constructor of the library that would cut the weights for ZeRO-3.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            _check_room(4 * sum(parameter.numel() for parameter in _outline(model_class, config).parameters()), device)
            torch.manual_seed(0)
            with torch.device(device):
                model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    _shake(model, device)
    return model.eval().requires_grad_(False)


def module_classes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> set[type]:
    """Of what classes the modules of a ``shallow_copy`` are; the model's alone where none can be built.

    Args:
        model_class, config: see there.
    """
    try:
        outline = _outline(model_class, shallow_config(config))
    except Exception:  # what the class raises, the copy will
        return {model_class}
    return {model_class, *map(type, outline.modules())}


def _outline(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> nn.Module:
    """The model without memory; its config then says float32, and an attention that all its parts have."""
    try:
        return _on_meta(model_class, config, "sdpa" if getattr(model_class, "_supports_sdpa", True) else "eager")
    except ValueError:  # a part of it has no sdpa
        return _on_meta(model_class, config, "eager")


def _on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig, attention: str) -> nn.Module:
    for part in nested_configs(config):
        part._attn_implementation, part.dtype = attention, torch.float32
    with torch.device("meta"):
        return model_class(config)


def _check_room(needed: int, device: torch.device) -> None:
    """A copy and what runs through it against the device's free memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif device.type == "cpu" and MEMORY.exists():
        # What files occupy in memory is given back when it is wanted.
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", MEMORY.read_text()).group(1))
    else:
        return
    if 1.5 * needed > free:
        raise MemoryError(f"it needs {1.5 * needed / 2**30:.1f} GiB on {device}, of which {free / 2**30:.1f} are free")


@torch.no_grad()
def _shake(model: nn.Module, device: torch.device) -> None:
    """Make every parameter random: matrices keep the size of what passes them, vectors stay about where they are."""
    generator = torch.Generator(device).manual_seed(0)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.ndim < 2:
            noise = torch.randn(parameter.shape, generator=generator, device=device)
            parameter.add_(0.1 * noise)
            continue
        # Of a convolution over pictures, what one place reads; the experts of a layer are a stack of matrices.
        inputs = parameter[0].numel() if parameter.ndim >= 4 else parameter.shape[-1]
        scale = 0.5 if id(parameter) in tables else 1.1 / inputs**0.5
        parameter.normal_(std=scale, generator=generator)


def shallow_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config with short windows and few text layers, see the module.

    Args:
        config: of any size; it is left as it is.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    for name, most in LENGTHS.items():
        value = getattr(text, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            setattr(text, name, min(value, most))
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, Mapping):
        text.rope_parameters = _short_rope(rope)
    _keep_one_of_each(text)
    chosen = max([1, *(value for name in CHOSEN if isinstance(value := getattr(text, name, None), int))])
    for name in EXPERTS:
        if isinstance(count := getattr(text, name, None), int) and count > max(FEW_EXPERTS, 2 * chosen):
            setattr(text, name, max(FEW_EXPERTS, 2 * chosen))
            for group in GROUPS:
                if hasattr(text, group):
                    setattr(text, group, 1)
    return config


def _short_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters (of all layers, or by kind of layer) with short lengths.

    That of longrope stays: around it sequences change each other (``positions.check_rotary_lengths``).
    """
    short = {}
    for name, value in rope.items():
        if isinstance(value, Mapping):
            value = _short_rope(value)
        elif name in LENGTHS and isinstance(value, (int, float)) and rope.get("rope_type") != "longrope":
            value = min(value, LENGTHS[name])
        short[name] = value
    return short


def _keep_one_of_each(text: PreTrainedConfig) -> None:
    """Cut a text config's layers to the first of each kind."""
    count = getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int) or count <= FEW_LAYERS:
        return
    columns = {
        name: value
        for name, value in vars(text).items()
        if isinstance(value, (list, tuple, str)) and len(value) == count and not name.endswith(("_idxs", "_indexes"))
    }
    for name in SOURCES:  # a layer is of one kind if it has its own
        if name in columns:
            columns[name] = [source == i for i, source in enumerate(columns[name])]
    for name in CHOSEN_LAYERS:
        columns.pop(name, None)
    chosen_layers = {name: value for name in CHOSEN_LAYERS if isinstance(value := getattr(text, name, None), list)}
    shared = count - (getattr(text, "num_kv_shared_layers", None) or 0)
    dense = getattr(text, "first_k_dense_replace", None) or 0
    sparse_step = getattr(text, "decoder_sparse_step", None) or 1
    plain = set(getattr(text, "mlp_only_layers", None) or [])
    kinds = [
        (
            *(str(x[i]) for x in columns.values()),
            *(i in x for x in chosen_layers.values()),
            i >= shared,
            i < dense,
            i in plain or (i + 1) % sparse_step > 0,
        )
        for i in range(count)
    ]
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    kept = sorted({*kept, *range(2)})
    for name in SOURCES:
        if name in columns:
            sources = getattr(text, name)
            kept = sorted({*kept, *(sources[i] for i in kept)})
            columns[name] = [kept.index(sources[i]) if i in kept else -1 for i in range(count)]
    text.num_hidden_layers = len(kept)
    for name, column in columns.items():
        chosen = [column[i] for i in kept]
        setattr(text, name, "".join(chosen) if isinstance(column, str) else type(column)(chosen))
    for name, column in chosen_layers.items():
        setattr(text, name, [place for place, i in enumerate(kept) if i in column])
    if hasattr(text, "num_kv_shared_layers"):
        text.num_kv_shared_layers = sum(i >= shared for i in kept)
    if hasattr(text, "first_k_dense_replace"):
        text.first_k_dense_replace = sum(i < dense for i in kept)
    if hasattr(text, "mlp_only_layers"):
        text.mlp_only_layers = [place for place, i in enumerate(kept) if kinds[i][-1]]
        if hasattr(text, "decoder_sparse_step"):
            text.decoder_sparse_step = 1
    logger.debug("kept layers %s of %d", kept, count)
