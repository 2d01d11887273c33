"""What the attention kernels for packed rows lack on a GPU, as far as a model's layers say it.

The limits are those of PyTorch 2.14. Flex attention rounds a head's size up to a power of two and runs with fewer
stages where shared memory is short: compiled for sm_90, heads of 512 (Gemma 4) fit, forward and backward, in bfloat16
and float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from .families import backbone

#: Sizes of heads: the smallest for flex attention, the largest for sequence lengths alone (flash attention), and the
#: number that the latter's are multiples of.
FLEX_SMALLEST, FLASH_LARGEST, FLASH_MULTIPLE = 16, 256, 8


def _attention_layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in backbone(model).get_decoder().modules():
        if hasattr(module, "num_key_value_groups") and _head_sizes(module)[0]:
            yield module


def _head_sizes(layer: Any) -> tuple[int | None, int | None]:
    """Of queries and keys, and of values, which differ in latent attention."""
    size = getattr(layer, "qk_head_dim", None) or getattr(layer, "head_dim", None)
    return size, getattr(layer, "v_head_dim", None) or size


def attention_gaps(model: nn.Module, kernel: str, dtype: torch.dtype | None = None) -> str | None:
    """What a kernel lacks on a GPU for a model's text layers, in words; None if nothing.

    Args:
        model: unwrapped (possibly PEFT), on any device; dropout counts in training mode alone.
        kernel: of ``vgs.models.attention.KERNELS``. ``"dense"`` lacks nothing; ``"auto"`` takes another where one lacks
            something.
        dtype: in which the layers compute; None where it is not known.
    """
    if kernel not in ("flex", "varlen"):
        return None
    layers = list(_attention_layers(model))
    sizes = [size for layer in layers for size in _head_sizes(layer)]
    rate = max((getattr(layer, "attention_dropout", 0.0) or 0.0 for layer in layers if layer.training), default=0.0)
    if rate:
        return f"its layers have an attention dropout of {rate}, which the kernel has not"
    if kernel == "flex":
        if sizes and min(sizes) < FLEX_SMALLEST:
            return f"its layers have heads of {min(sizes)}, and the kernel's have at least {FLEX_SMALLEST}"
        if dtype == torch.float64:
            return "it computes in float64, which the kernel does not"
        return None
    if dtype is not None and dtype.itemsize != 2:
        return f"it computes in {str(dtype).removeprefix('torch.')}, and the kernel in 16 bits alone"
    wrong = [size for size in sizes if size > FLASH_LARGEST or size % FLASH_MULTIPLE]
    if wrong:
        return (
            f"its layers have heads of {max(wrong)}, and the kernel's are multiples of {FLASH_MULTIPLE} up to "
            f"{FLASH_LARGEST}"
        )
    uneven = [layer for layer in layers if len(set(_head_sizes(layer))) > 1]
    if uneven:
        query, value = _head_sizes(uneven[0])
        return f"its layers have heads of {query} for keys and {value} for values, which the kernel's share"
    caps = [getattr(layer, "attn_logit_softcapping", None) for layer in layers]
    if any(caps):
        return f"its layers cap attention scores at {max(filter(None, caps))}, which the kernel does not"
    if any(hasattr(layer, "sinks") for layer in layers):
        return "its layers have attention sinks, which the kernel has not"
    return None


def usable_kernel(model: nn.Module, kernel: str, device: torch.device | str) -> str:
    """A kernel that runs a model's packed rows: ``"auto"`` where its own choice does, else one that lacks nothing.

    Args:
        model: as in ``attention_gaps``.
        kernel: what the user asks for; anything but ``"auto"`` stays.
        device: of the rows.
    """
    if kernel != "auto" or torch.device(device).type != "cuda":
        return kernel
    if attention_gaps(model, "flex") is not None:
        return "dense"
    return "auto" if attention_gaps(model, "varlen") is None else "flex"


def check_kernel(
    name: str, model: nn.Module, kernel: str, device: torch.device | str, dtype: torch.dtype | None = None
) -> None:
    """Stop where the kernel that the user asks for cannot run a model.

    Args:
        name: of the model's argument, for the message.
        model, kernel, dtype: as in ``attention_gaps``.
        device: of the rows; only GPUs have other kernels.

    Raises:
        ConfigError: what the kernel lacks.
    """
    gap = attention_gaps(model, kernel, dtype) if torch.device(device).type == "cuda" else None
    if gap is not None:
        raise ConfigError(
            f'packed_attention="{kernel}" cannot run {name}, a {type(model).__name__}: {gap}. Use "auto" or "dense".'
        )
