"""Whether a model or a layer is PEFT's, without importing PEFT: before somebody else has, none can be."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model is a ``peft.PeftModel``."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def without_adapter(model: Any) -> Any:
    """The model inside a ``peft.PeftModel``; any other is returned as it is."""
    return model.base_model.model if is_peft_model(model) else model


def is_adapter_layer(layer: nn.Module) -> bool:
    """Whether a layer is an adapter of PEFT (LoRA, ...) around another layer."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(layer, BaseTunerLayer)


def is_peft_layer(layer: nn.Module) -> bool:
    """Whether a layer is an adapter, or one of PEFT's copies of a layer (``modules_to_save``)."""
    if "peft" not in sys.modules:
        return False
    from peft.utils.other import AuxiliaryTrainingWrapper

    return is_adapter_layer(layer) or isinstance(layer, AuxiliaryTrainingWrapper)
