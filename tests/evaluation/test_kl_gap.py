"""The KL gap between privileged and plain context, the noise control, and privileged prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from selves import privileged_samples
from tiny import tiny_image, tiny_model, tiny_processor, tiny_samples

from vgs.data.privileged import privileged_groups, privileged_sample
from vgs.data.prompts import encode_groups
from vgs.evaluation.kl_gap import kl_gap, on_policy
from vgs.evaluation.sampling import Sampling
from vgs.models.families import placeholder_ids
from vgs.models.forward import score_groups
from vgs.models.groups import PromptGroup
from vgs.models.heads import read_head

ANSWERS = [[20, 21, 1], [22, 1], [23, 24, 25, 1], [26, 1]]


def test_identical_contexts_have_no_gap() -> None:
    found = kl_gap(tiny_model(0), tiny_processor(), tiny_samples(4), ANSWERS)
    assert found == {"gap": pytest.approx(0, abs=1e-6), "reverse": pytest.approx(0, abs=1e-6), "tokens": 11}


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_gap_is_the_mean_over_tokens(batch_size: int) -> None:
    """Against float64 softmaxes of both contexts, however the samples are batched."""
    model, other, processor, samples = tiny_model(0), tiny_model(1), tiny_processor(), privileged_samples(4)
    forbidden = placeholder_ids(model.config)
    seen = [{**sample, "images": sample["images"] + sample["privileged_images"]} for sample in samples]
    p, own, theirs = (
        logits(each, encode_groups(processor, part, [[ids] for ids in ANSWERS], forbidden))
        for each, part in ((model, samples), (model, seen), (other, seen))
    )
    for teacher, q in ((None, own), (other, theirs)):
        found = kl_gap(model, processor, samples, ANSWERS, teacher=teacher, batch_size=batch_size, temperature=2.0)
        log_p, log_q = torch.log_softmax(p / 2, -1), torch.log_softmax(q / 2, -1)
        gap, reverse = (log_q.exp() * (log_q - log_p)).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1)
        assert found == {
            "gap": pytest.approx(gap.mean().item(), rel=1e-4),
            "reverse": pytest.approx(reverse.mean().item(), rel=1e-4),
            "tokens": 11,
        }
        assert found["gap"] > 1e-3


@torch.no_grad()
def logits(model: torch.nn.Module, groups: list[PromptGroup]) -> torch.Tensor:
    (rows,) = score_groups(model, groups, text=False)
    return (rows @ read_head(model, rows.dtype).weight.T).double()


def test_wrong_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="one entry for each of 4 samples, got 1"):
        kl_gap(tiny_model(0), tiny_processor(), privileged_samples(4), [[20]])
    with pytest.raises(ValueError, match="responses must have tokens"):
        kl_gap(tiny_model(0), tiny_processor(), privileged_samples(2), [[], []])


def test_responses_are_sampled_from_the_plain_context() -> None:
    model, processor = tiny_model(0).train(), tiny_processor()
    drawn = [
        on_policy(model, processor, samples, Sampling(greedy=False, max_new_tokens=5), seed=seed)
        for seed, samples in ((0, privileged_samples(3)), (0, tiny_samples(3)), (1, tiny_samples(3)))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.training and all(0 < len(ids) <= 5 for ids in drawn[0])


# ---- privileged prompts and their control


def test_noise_keeps_sizes_and_token_counts() -> None:
    processor, samples = tiny_processor(), privileged_samples(6)
    samples[1]["privileged_images"] = [tiny_image(7, width=64), tiny_image(8)]
    groups = encode_groups(processor, samples, [[ids] for ids in (ANSWERS * 2)[:6]], [])
    real, noise, again = (
        privileged_groups(processor, samples, groups, [], control=control) for control in (None, "noise", "noise")
    )
    for index, (one, other, same) in enumerate(zip(real, noise, again, strict=True)):
        assert torch.equal(one.prompt_ids, other.prompt_ids)
        assert torch.equal(one.images["image_grid_thw"], other.images["image_grid_thw"])
        own = len(groups[index].images["pixel_values"])
        assert torch.equal(one.images["pixel_values"][:own], other.images["pixel_values"][:own]), "the sample's own"
        assert not torch.equal(one.images["pixel_values"][own:], other.images["pixel_values"][own:])
        assert torch.equal(other.images["pixel_values"], same.images["pixel_values"]), "the same in every epoch"
        assert one.responses is other.responses is groups[index].responses
    for sample in samples:
        shown = privileged_sample(sample, "replace", "noise")["images"]
        assert [image.size for image in shown] == [image.size for image in sample["privileged_images"]]
    first, second = (noise[i].images["pixel_values"][-16:] for i in (0, 3))
    assert not torch.equal(first, second), "another sample, other noise"


def test_noise_is_gaussian() -> None:
    sample = {"prompt": [], "privileged_images": [tiny_image(0, 200, 200)]}
    (image,) = privileged_sample(sample, "add", "noise")["images"]
    values = np.asarray(image, dtype=float)
    inside = values[(values > 0) & (values < 255)]
    assert values.mean() == pytest.approx(127.5, abs=1.5) and 50 < inside.std() < 64
    assert np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1] == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    ("extra", "mode", "text", "images"),
    [
        ({"privileged_images": ["x"]}, "add", "red ?", ["own", "x"]),
        ({"privileged_images": ["x"]}, "replace", "red ?", ["x"]),
        ({"privileged_images": None}, "replace", "red ?", ["own"]),
        ({"privileged_text": "it is blue"}, "replace", "red ?\nit is blue", ["own"]),
        ({"privileged_prompt": [{"role": "user", "content": "blue ?"}]}, "add", "blue ?", ["own"]),
        (
            {"privileged_prompt": [{"role": "user", "content": "blue ?"}], "privileged_text": "yes"},
            "add",
            "blue ?\nyes",
            ["own"],
        ),
    ],
)
def test_what_the_teacher_sees(extra: dict[str, Any], mode: str, text: str, images: list[str]) -> None:
    prompt = [{"role": "system", "content": "a"}, {"role": "user", "content": "red ?"}]
    seen = privileged_sample({"prompt": prompt, "images": ["own"], **extra}, mode)
    assert seen["prompt"][-1] == {"role": "user", "content": text} and seen["images"] == images
    assert prompt[-1]["content"] == "red ?", "the student's prompt is as it was"


def test_a_note_goes_into_content_blocks_and_needs_a_user() -> None:
    blocks = [{"role": "user", "content": [{"type": "text", "text": "red ?"}]}]
    seen = privileged_sample({"prompt": blocks, "privileged_text": "blue"})
    assert seen["prompt"][0]["content"] == [{"type": "text", "text": "red ?"}, {"type": "text", "text": "\nblue"}]
    with pytest.raises(ValueError, match="privileged_text needs a user message"):
        privileged_sample({"prompt": [{"role": "system", "content": "a"}], "privileged_text": "blue"})
