"""Weights of a checkpoint whose names are those of the files on the hub, not those of the modules.

transformers saves models of many families (Qwen2.5-VL, LLaVA, ...) under the names of their published files, and
renames on loading, in ``from_pretrained`` alone. Its trainer loads a checkpoint's names as they stand, without an error
where they fit no parameter, so such a run would go on from its initial weights.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError

logger = logging.getLogger(__name__)


def saved_names(checkpoint: str | Path) -> set[str]:
    """Names of the tensors in a checkpoint's safetensors files; empty where it has none."""
    names: set[str] = set()
    for path in Path(checkpoint).glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@torch.no_grad()
def load_renamed_weights(model: nn.Module, checkpoint: str | Path) -> bool:
    """Load a checkpoint's weights by ``from_pretrained`` where their names are not the model's.

    Args:
        model: the unwrapped student, whole on this process. One that is wrapped by PEFT, or whose weights other
            engines keep, is left as it is.
        checkpoint: the folder.

    Returns:
        Whether the weights were loaded here.

    Raises:
        ConfigError: a parameter that the checkpoint does not have.
    """
    names, own = saved_names(checkpoint), model.state_dict()
    if not isinstance(model, PreTrainedModel) or not names or names <= set(own):
        return False
    fresh = type(model).from_pretrained(checkpoint, dtype=next(model.parameters()).dtype).state_dict()
    if missing := sorted(set(own) - set(fresh)):
        raise ConfigError(f"The checkpoint {str(checkpoint)!r} has no weights for {missing[0]}.")
    for name, tensor in own.items():
        tensor.copy_(fresh[name])
    logger.debug("The weights of %s were loaded under the names of the published files.", checkpoint)
    return True
