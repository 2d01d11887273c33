"""Prompts of real processors, read from disk by the Auto classes: encoded one by one, in both views, and scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from real_checkpoints import REAL_FAMILIES, photo_samples
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature
from transformers.utils import is_torchvision_available

import vgs
from vgs.data.lengths import prompt_length
from vgs.data.messages import fill_images
from vgs.data.prompts import unexpanded_ids
from vgs.models.families import placeholder_ids
from vgs.models.groups import PER_TOKEN_FIELDS, PromptGroup

RESPONSES = [[[70, 71, 72], [80, 81, 82, 83, 84]], [[90, 91], [73, 74, 75, 76]], [[100], [75, 76, 77]]]


class Real(NamedTuple):
    """A family's model and processor, and its samples (one image, two, none) as groups of two responses each."""

    processor: Any
    model: nn.Module
    samples: list[dict]

    @property
    def forbidden(self) -> list[int]:
        return placeholder_ids(self.model.config)

    def groups(self, samples: Sequence[dict] | None = None) -> list[PromptGroup]:
        samples = self.samples if samples is None else samples
        return vgs.encode_groups(self.processor, samples, RESPONSES[: len(samples)], self.forbidden)

    def alone(self, sample: dict, with_images: bool) -> BatchFeature:
        """What the processor says to this prompt alone."""
        images = [{"type": "image", "image": image} for image in sample["images"]] if with_images else []
        text = {"type": "text", "text": sample["prompt"][0]["content"]}
        return self.processor.apply_chat_template(
            [{"role": "user", "content": [*images, text]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    def states(self, sample: dict, response: list[int], with_images: bool) -> Tensor:
        """[T, D] hidden states that predict the response, of one plain forward."""
        inputs = self.alone(sample, with_images)
        prompt = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([response])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in PER_TOKEN_FIELDS:
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.zeros(1, len(response), dtype=torch.int64)], dim=1)
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state[0, prompt - 1 : -1]


@pytest.fixture(scope="module", params=REAL_FAMILIES)
def real(request: pytest.FixtureRequest, checkpoint: Callable[..., Path], tmp_path_factory: Any) -> Real:
    folder = checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
    return Real(AutoProcessor.from_pretrained(folder), model, photo_samples(tmp_path_factory.mktemp("photos")))


def relative_difference(rows: Tensor, expected: Tensor) -> float:
    assert rows.shape == expected.shape
    return ((rows - expected).abs().max() / expected.abs().max()).item()


def test_checkpoints_are_what_a_user_has(real: Real, checkpoint: Callable[..., Path]) -> None:
    for part in (real.processor, real.processor.image_processor, real.processor.tokenizer, real.model):
        assert type(part).__module__.startswith("transformers.")
    assert is_torchvision_available()  # without it other image processors would have been read
    assert real.model.num_parameters() < 1_000_000
    family = Path(real.model.name_or_path).name.removesuffix("_student")
    folder = checkpoint(family, teacher=True)
    teacher = AutoModelForImageTextToText.from_pretrained(folder)
    assert AutoProcessor.from_pretrained(folder).tokenizer.get_vocab() == real.processor.tokenizer.get_vocab()
    heads = [model.get_output_embeddings().weight for model in (real.model, teacher)]
    assert [head.shape[1] for head in heads] == [32, 48]
    tied = [
        model.get_input_embeddings().weight is model.get_output_embeddings().weight for model in (real.model, teacher)
    ]
    assert tied == [family != "muse_spark", False]  # whose class ties nothing, whatever its config says


def test_each_prompt_is_encoded_as_if_alone(real: Real) -> None:
    for group, sample in zip(real.groups(), real.samples, strict=True):
        expected = dict(real.alone(sample, True))
        assert group.prompt_ids.tolist() == expected.pop("input_ids")[0].tolist()
        expected.pop("attention_mask")
        assert group.images.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(group.images[name], value[0] if name in PER_TOKEN_FIELDS else value), name
        assert real.processor.tokenizer.pad_token_id not in group.prompt_ids


def test_the_text_only_view_is_rendered_without_images(real: Real) -> None:
    for group, sample in zip(real.groups(), real.samples, strict=True):
        assert group.text_prompt_ids.tolist() == real.alone(sample, False)["input_ids"][0].tolist()
        assert not set(group.text_prompt_ids.tolist()) & {*real.forbidden, real.processor.tokenizer.pad_token_id}
    alone = real.groups(real.samples[:1])[0]
    assert torch.equal(alone.text_prompt_ids, real.groups()[0].text_prompt_ids)  # whatever else is in the batch


@pytest.mark.parametrize("with_images", [False, True], ids=["text only", "with an image"])
def test_a_typed_placeholder_is_refused_with_its_row(real: Real, with_images: bool) -> None:
    config = real.model.config
    typed = {real.processor.image_token, real.processor.tokenizer.convert_ids_to_tokens(config.image_token_id)}
    for token in typed:
        message = {"role": "user", "content": f"what is {token} ?"}
        sample = {"prompt": [message], "images": real.samples[0]["images"] if with_images else []}
        with pytest.raises(ValueError, match=r"^sample 2: .*placeholder") as error:
            real.groups([*real.samples[:2], sample])
        assert token in str(error.value)


@torch.no_grad()
def test_states_equal_those_of_separate_forwards(real: Real) -> None:
    rows = vgs.score_groups(real.model, real.groups())
    for view, with_images in zip(rows, (True, False), strict=True):
        parts = [
            real.states(sample, response, with_images)
            for sample, responses in zip(real.samples, RESPONSES, strict=True)
            for response in responses
        ]
        assert relative_difference(view, torch.cat(parts)) <= 1e-5


@torch.no_grad()
def test_every_picture_matters(real: Real) -> None:
    """Otherwise the comparison of states would mean nothing."""
    sample = real.samples[1]
    expected = real.states(sample, [70, 71], True)
    for place in range(2):
        images = list(sample["images"])
        images[place] = Image.new("RGB", images[place].size, (250, 10, 120))
        other = real.states({**sample, "images": images}, [70, 71], True)
        assert relative_difference(other, expected) > 1e-2


def test_unexpanded_prompts_have_one_mark_per_image(real: Real) -> None:
    """What vLLM is sent, which expands the marks itself."""
    for group, sample in zip(real.groups(), real.samples, strict=True):
        ids = unexpanded_ids(real.processor, fill_images(sample["prompt"], sample["images"]))
        if not sample["images"]:
            assert ids == group.prompt_ids.tolist()
            continue
        mark = real.processor.tokenizer.convert_tokens_to_ids(real.processor.image_token)
        assert ids.count(mark) == len(sample["images"]) and len(ids) < len(group.prompt_ids)


def test_prompt_lengths_are_those_of_the_processor(real: Real) -> None:
    for sample in real.samples:
        assert prompt_length(real.processor, sample) == real.alone(sample, True)["input_ids"].shape[1]
