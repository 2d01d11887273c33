"""Outputs of ``get_image_features`` in every form that families have, repeated for the rows that share a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vgs.models.shared_images import SharedImages, images_once, shares_images

IMAGE = 7
#: Two images of two tokens each; one of three.
PROMPTS = (torch.tensor([1, IMAGE, IMAGE, 2, IMAGE, IMAGE]), torch.tensor([3, IMAGE, IMAGE, IMAGE, 4]))
SIZES, REPEATS = [2, 2, 3], (1, 2)
FEATURES = torch.arange(14.0).view(7, 2)
ROWS = [*range(4), *range(4, 7), *range(4, 7)]  # of the features: the second prompt stands in two rows
SHARED = SharedImages(
    PROMPTS, REPEATS, {"pixel_values": torch.zeros(7, 3), "image_grid_thw": torch.tensor([[1, 1, x] for x in SIZES])}
)


class Body(nn.Module):
    """Takes features in one form, as a family's body does."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.config = PreTrainedConfig(image_token_id=IMAGE, vision_start_token_id=1)
        self.made, self.seen = made, []

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any) -> Any:
        self.seen.append((pixel_values, image_grid_thw, kwargs))
        return self.made(FEATURES.clone())

    def forward(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Any:
        return self.get_image_features(pixel_values, image_grid_thw=image_grid_thw, return_dict=True)


def flat(value: Any) -> Tensor:
    """The features of a form, one behind the other."""
    if isinstance(value, Tensor):
        return value.reshape(-1, value.shape[-1])
    return torch.cat([flat(x) for x in value])


def pooled(value: Any) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(last_hidden_state=torch.zeros(7, 2), pooler_output=value)


#: Form -> how it is made, and the lists of features in the result.
FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], list[Any]]]] = {
    "tensor": (pooled, lambda out: [out.pooler_output]),
    "tiles": (lambda x: pooled(x.view(7, 1, 2)), lambda out: [out.pooler_output]),
    "list": (lambda x: pooled(list(x.split(SIZES))), lambda out: [out.pooler_output]),
    "tuple": (lambda x: pooled(x.split(SIZES)), lambda out: [out.pooler_output]),
    "no output class": (lambda x: x.split(SIZES), lambda out: [out]),
    "layers": (lambda x: pooled([x.split(SIZES), x.split(SIZES)]), lambda out: list(out.pooler_output)),
    "numbered layers": (
        lambda x: pooled([(3, list(x.split(SIZES))), (5, x)]),
        lambda out: [part for _, part in out.pooler_output],
    ),
    "last state alone": (
        lambda x: BaseModelOutputWithPooling(last_hidden_state=x, hidden_states=(x,)),
        lambda out: [out.last_hidden_state],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_features_are_repeated_in_the_order_of_the_rows(form: str) -> None:
    made, parts = FORMS[form]
    body = Body(made)
    repeated = torch.zeros(9, 3), torch.zeros(4, 3)
    with images_once(body, SHARED):
        output = body(*repeated)
    for part in parts(output):
        assert torch.equal(flat(part), FEATURES[ROWS])
    ((pixels, grid, options),) = body.seen
    assert pixels is repeated[0] and grid is SHARED.fields["image_grid_thw"] and options == {"return_dict": True}
    body(*repeated)
    assert body.seen[1][1] is repeated[1], "outside it is as before"
    assert "get_image_features" not in vars(body)


def test_what_is_not_merged_stays_as_it_is() -> None:
    body = Body(lambda x: BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x, hidden_states=(x,)))
    with images_once(body, SHARED):
        output = body(torch.zeros(1), torch.zeros(1))
    assert len(output.last_hidden_state) == len(output.hidden_states[0]) == 7 and len(output.pooler_output) == 10


def test_features_that_are_not_one_for_each_placeholder() -> None:
    body = Body(lambda x: pooled(x[:6]))
    words = r"Body\.get_image_features does not return one feature for each image placeholder"
    with pytest.raises(ValueError, match=words), images_once(body, SHARED):
        body(torch.zeros(1), torch.zeros(1))
    assert "get_image_features" not in vars(body)


def test_a_forward_that_does_not_ask() -> None:
    class Other(Body):
        def forward(self, **inputs: Any) -> None:
            return None

    assert shares_images(Body(pooled)) and not shares_images(Other(pooled))
    words = "Other has get_image_features, but its forward does not call it"
    with pytest.raises(ValueError, match=words), images_once(Other(pooled), SHARED):
        pass
