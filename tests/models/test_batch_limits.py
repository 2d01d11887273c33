"""What no batch may do: change rotary frequencies of its shorter sequences, train nothing."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, shaken
from torch import nn

from vgs.errors import ConfigError
from vgs.models.families import freeze
from vgs.models.forward import score_groups
from vgs.models.states import plain_states

FAMILY = FAMILIES["internvl"]


def with_rope(kind: str) -> nn.Module:
    """A model whose frequencies change beyond 128 tokens."""
    model = FAMILY.build()
    text = model.config.text_config
    half = text.head_dim // 2
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
    text.rope_parameters, text.max_position_embeddings = rope, 128
    torch.manual_seed(0)
    return shaken(type(model)(model.config).eval())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@torch.no_grad()
def test_long_sequences_do_not_change_short_ones(kind: str) -> None:
    model, short, long = with_rope(kind), FAMILY.group([], [3, 6], 1), FAMILY.group([FAMILY.small], [140], 0)
    for rows, expected in zip(score_groups(model, [short]), plain_states(model, [short]), strict=True):
        torch.testing.assert_close(rows, expected)
    with pytest.raises(ConfigError, match=f'^rope_type "{kind}" .* beside one of .* within 128 tokens'):
        score_groups(model, [short, long])


@torch.no_grad()
def test_sequences_that_are_all_long_are_scored() -> None:
    model, groups = with_rope("longrope"), [FAMILY.group([], [130, 140], 1), FAMILY.group([FAMILY.small], [150], 0)]
    for rows, expected in zip(score_groups(model, groups), plain_states(model, groups), strict=True):
        torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = FAMILY.build().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"^No parameter of the InternVL.* requires gradient"):
        freeze(model)
    model.get_output_embeddings().requires_grad_(True)
    freeze(model)
