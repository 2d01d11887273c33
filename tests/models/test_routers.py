"""Losses of routers that a config asks for are refused, and nothing else."""

from __future__ import annotations

import pytest
import transformers as hf
from transformers import PreTrainedConfig

from vgs.errors import ConfigError
from vgs.models.routers import check_routers


def llava(text: PreTrainedConfig) -> PreTrainedConfig:
    return hf.LlavaConfig(text_config=text)


ASKING = {
    "router_aux_loss_coef=0.001": [
        hf.Qwen3VLMoeConfig(text_config={"output_router_logits": True}),
        hf.Qwen3MoeConfig(output_router_logits=True),
        llava(hf.Qwen2MoeConfig(output_router_logits=True)),
    ],
    "router_aux_loss_coef=0.0001": [hf.Glm4vMoeConfig(text_config={"output_router_logits": True})],
    "aux_loss_coef=0.01": [hf.JetMoeConfig(output_router_logits=True)],
    "moe_loss_weight=0.01": [hf.DbrxConfig(output_router_logits=True)],
}
SILENT = [
    hf.Qwen3VLMoeConfig(),
    hf.Qwen3VLMoeConfig(text_config={"output_router_logits": True, "router_aux_loss_coef": 0.0}),
    hf.Kimi_K25Config(text_config={"model_type": "deepseek_v3", "output_router_logits": True}),  # has no such loss
    hf.Qwen3VLConfig(),
]


@pytest.mark.parametrize(
    ("weight", "config"),
    [pytest.param(weight, x, id=x.model_type) for weight, configs in ASKING.items() for x in configs],
)
def test_a_loss_of_the_router_is_refused(weight: str, config: PreTrainedConfig) -> None:
    match = rf"^model's config has output_router_logits=True and {weight}, .* Set output_router_logits to false"
    with pytest.raises(ConfigError, match=match):
        check_routers("model", config)


@pytest.mark.parametrize("config", SILENT, ids=lambda x: x.model_type)
def test_a_config_that_asks_for_nothing_passes(config: PreTrainedConfig) -> None:
    check_routers("model", config)
