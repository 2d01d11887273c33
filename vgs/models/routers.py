"""Routers of mixtures of experts, and the loss of their own that a config can ask for."""

from __future__ import annotations

import re

from transformers import PreTrainedConfig

from ..errors import ConfigError
from .families import nested_configs

#: Names in a config of the weight of such a loss: that of most families, JetMoE's, DBRX's, and weights of z-losses.
_WEIGHT = re.compile(r"(router_)?(aux|z)_loss_coef(ficient)?|moe_loss_weight")


def check_routers(name: str, config: PreTrainedConfig) -> None:
    """Stop where a student's config asks for a loss that balances the load of its experts.

    The library adds it to a loss of labels, and counts the tokens of a padded batch for it, prompts as often as they
    have responses. Here prompts are shared, in two views: what should count is nobody's convention. It is not left out
    without a word.

    Args:
        name: of the argument, for the message.
        config: the student's.

    Raises:
        ConfigError: ``output_router_logits`` is true, and a weight of such a loss is not zero.
    """
    fields = [field for part in nested_configs(config) for field in vars(part).items()]
    if not any(field == "output_router_logits" and value is True for field, value in fields):
        return
    weight = next(((field, value) for field, value in fields if _WEIGHT.fullmatch(field) and value), None)
    if weight is not None:
        raise ConfigError(
            f"{name}'s config has output_router_logits=True and {weight[0]}={weight[1]}, a loss that balances the load "
            "of its experts, which no objective here has. Set output_router_logits to false in its text config: then "
            "the experts train on the objective alone."
        )
